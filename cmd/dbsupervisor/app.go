package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/engine"
)

// configDir is where configurations are looked for.
const configDir = "/etc/dbsupervisor"

// stdio is what a command reads and writes.
type stdio struct {
	in       io.Reader
	out, err io.Writer
}

// app is what all commands share.
type app struct {
	stdio
	configPath string
	code       int // exit code of a command that succeeded; 0 unless set
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, std stdio) int {
	a := &app{stdio: std}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(std.in)
	root.SetOut(std.out)
	root.SetErr(std.err)
	if err := root.ExecuteContext(ctx); err != nil {
		return a.explain(err)
	}
	return a.code
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "dbsupervisor",
		Short:         "One database, one writer, on several machines",
		Long:          "dbsupervisor keeps one database alive on several machines: one writer at any time,\na consistent snapshot on a shared file system on a schedule, failover without a hand.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&a.configPath, "config", "", "configuration file (default $DBSUPERVISOR_CONFIG, or the only "+configDir+"/*.yaml)")
	_ = root.MarkPersistentFlagFilename("config", "yaml") // the flag exists
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{err: err, help: cmd.CommandPath()}
	})
	root.AddGroup(
		&cobra.Group{ID: "look", Title: "Look:"},
		&cobra.Group{ID: "operate", Title: "Operate:"},
		&cobra.Group{ID: "data", Title: "Data:"},
		&cobra.Group{ID: "setup", Title: "Set up:"},
	)
	root.AddCommand(
		in("look", a.statusCmd()), in("look", a.historyCmd()), in("look", a.forksCmd()), in("look", a.snapshotsCmd()),
		in("operate", a.syncCmd()), in("operate", a.switchoverCmd()), in("operate", a.failoverCmd()),
		in("operate", a.pauseCmd()), in("operate", a.resumeCmd()), in("operate", a.agentCmd()),
		in("data", a.restoreCmd()), in("data", a.rollbackCmd()), in("data", a.importCmd()), in("data", a.rescueCmd()),
		in("setup", a.initCmd()), in("setup", a.runCmd()), in("setup", a.guardCmd()), in("setup", a.proxyCmd()), in("setup", a.configCmd()), in("setup", a.volumeCmd()), in("setup", a.decommissionCmd()),
		a.versionCmd(), exitCodesTopic(),
	)
	strict(root)
	return root
}

func in(group string, cmd *cobra.Command) *cobra.Command {
	cmd.GroupID = group
	return cmd
}

// strict makes wrong arguments a usage error everywhere.
func strict(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return &usageError{err: err, help: cmd.CommandPath()}
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
}

// usageError is a command line that makes no sense.
type usageError struct {
	err  error
	help string
}

func (u *usageError) Error() string { return u.err.Error() }
func (u *usageError) Unwrap() error { return u.err }
func (u *usageError) Hint() string  { return "see: " + u.help + " --help" }

// load finds, reads and checks the configuration, the database's profile merged in.
func (a *app) load() (*config.Config, []string, error) {
	path, err := a.findConfig()
	if err != nil {
		return nil, nil, err
	}
	cfg, err := config.Load(path)
	if err != nil {
		return nil, nil, err
	}
	own := cfg.Warnings() // before the profile adds what nobody wrote into the file
	warnings, err := engine.Resolve(cfg)
	if err != nil {
		return nil, nil, err
	}
	return cfg, append(own, warnings...), nil
}

// inUnits writes "1h50m", and "1h" where nothing is left over.
func inUnits(n int, unit string, rest int, small string) string {
	if rest == 0 {
		return strconv.Itoa(n) + unit
	}
	return strconv.Itoa(n) + unit + strconv.Itoa(rest) + small
}

// client loads the configuration and makes a client for its agent.
func (a *app) client() (*config.Config, *api.Client, error) {
	cfg, _, err := a.load()
	if err != nil {
		return nil, nil, err
	}
	return cfg, api.NewClient(cfg.RunDir), nil
}

func (a *app) findConfig() (string, error) {
	if a.configPath != "" {
		return a.configPath, nil
	}
	if p := os.Getenv("DBSUPERVISOR_CONFIG"); p != "" {
		return p, nil
	}
	found, err := filepath.Glob(filepath.Join(configDir, "*.yaml"))
	if err != nil {
		return "", fmt.Errorf("look for a configuration: %w", err)
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", configError("holds no configuration (*.yaml)", "name one with --config, or write one: dbsupervisor config example > "+configDir+"/shop.yaml")
	}
	return "", configError("holds several configurations", "choose one with --config: "+strings.Join(found, ", "))
}

func configError(msg, hint string) error {
	return &config.Error{File: configDir, Msg: msg, Advice: hint}
}

// onTerminal says whether a person sits at the stream.
func onTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// errRefused: the person said no.
var errRefused = errors.New("nothing was done")

// confirm shows what will happen and wants a "yes" unless yes is set already.
func (a *app) confirm(yes bool, text string) error {
	fmt.Fprintln(a.err, text)
	if yes {
		return nil
	}
	if f, isFile := a.in.(*os.File); isFile && !onTerminal(f) {
		return api.WithHint(fmt.Errorf("ask for confirmation: no terminal: %w", errRefused), "add --yes when you are sure")
	}
	fmt.Fprint(a.err, `Type "yes" to go on: `)
	var answer string
	if _, err := fmt.Fscanln(a.in, &answer); err != nil || answer != "yes" {
		return errRefused
	}
	return nil
}

// since is a duration as people say it.
func since(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Second:
		return d.Truncate(time.Millisecond).String()
	case d < 10*time.Second:
		return d.Truncate(100 * time.Millisecond).String()
	case d < time.Minute:
		return d.Truncate(time.Second).String()
	case d < time.Hour:
		return inUnits(int(d/time.Minute), "m", int(d/time.Second)%60, "s")
	case d < 48*time.Hour:
		return inUnits(int(d/time.Hour), "h", int(d/time.Minute)%60, "m")
	}
	return fmt.Sprintf("%d days", int(d/(24*time.Hour)))
}
