// Package fence keeps a database that has lost its term from taking writes: a gate in the
// kernel's packet filter that closes by itself, a guard process that kills at the deadline,
// and a freezer that can't leave the database frozen.
package fence

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"time"

	"dbsupervisor/internal/boottime"

	"github.com/hashicorp/go-hclog"
)

// Errors of a Gate. Test them with errors.Is.
var (
	// ErrNoNFT: the nft command is missing or can't be used (not root, no kernel support).
	ErrNoNFT = errors.New("nft can't be used; install the nftables package and run as root")
	// ErrTooLate: the deadline was over before the gate could be opened for it. It is closed.
	ErrTooLate = errors.New("deadline is already over")
)

var tableName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,62}$`)

// GateConfig describes one gate.
type GateConfig struct {
	// Table is the nftables table that the gate owns, of the inet family: a letter, then
	// letters, digits, _ and -. One per instance on this machine.
	Table string
	// Ports are the TCP ports of this machine (not of the container) that clients use.
	Ports []uint16
	// Clock defaults to boottime.Real.
	Clock boottime.Clock
	// Log defaults to a null logger.
	Log hclog.Logger
	// NFT is the command with leading arguments; default nft. Tests use other namespaces.
	NFT []string
}

// Gate lets TCP packets to and from the database's ports pass only while a timer in the
// kernel runs. Every packet is checked, so established connections end with the timer too, and
// clients learn it from a reset at once. No process takes part once the timer has been set.
//
// It covers ports of this machine: those that a local process serves and those that Docker
// publishes, whether through NAT or its proxy. It does not cover UDP, nor connections made to
// a container's own address inside of its Docker network (the guard's kill does).
//
// The kernel's timer stands still while the machine is suspended; the guard's does not.
type Gate struct {
	cfg GateConfig
	cmd nftCommand
}

// NewGate returns a gate; nothing is changed before Install.
func NewGate(cfg GateConfig) *Gate {
	if cfg.Clock == nil {
		cfg.Clock = boottime.Real{}
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if len(cfg.NFT) == 0 {
		cfg.NFT = []string{"nft"}
	}
	cfg.Ports = append([]uint16(nil), cfg.Ports...)
	sort.Slice(cfg.Ports, func(i, j int) bool { return cfg.Ports[i] < cfg.Ports[j] })
	return &Gate{cfg: cfg, cmd: nftCommand{argv: cfg.NFT}}
}

// Install puts the gate in place, in one transaction. A new gate is closed. Where the same
// gate stands already (an agent restart), its rules are renewed and a timer that still runs
// goes on, so that a healthy database's connections survive; call Close to end it.
func (g *Gate) Install(ctx context.Context) error {
	if err := g.check(); err != nil {
		return fmt.Errorf("install gate: %w", err)
	}
	if _, err := g.cmd.run(ctx, g.ruleset); err != nil {
		return fmt.Errorf("install gate: %w", err)
	}
	return nil
}

// OpenFor opens the gate, or keeps it open, until d from now, whatever it was before.
func (g *Gate) OpenFor(ctx context.Context, d time.Duration) error {
	return g.OpenUntil(ctx, g.cfg.Clock.Now().Add(d))
}

// OpenUntil opens the gate, or keeps it open, until a deadline, whatever it was before. The
// time left is taken at the last moment, so that a caller that was stopped on the way does not
// open it for longer; after the deadline the gate is closed and the error is ErrTooLate.
// Rules that somebody has removed (a flush of the whole rule set) are put back.
func (g *Gate) OpenUntil(ctx context.Context, deadline boottime.Instant) error {
	script := func() (string, error) {
		left := deadline.Sub(g.cfg.Clock.Now()).Milliseconds()
		if left <= 0 {
			return "", ErrTooLate
		}
		return g.elements(left), nil
	}
	_, err := g.cmd.run(ctx, script)
	if err != nil && isMissing(err) {
		if cerr := g.check(); cerr != nil {
			return fmt.Errorf("open gate: %w", cerr)
		}
		g.cfg.Log.Warn("firewall table was gone, installing it again", "table", g.cfg.Table)
		_, err = g.cmd.run(ctx, func() (string, error) {
			rules, _ := g.ruleset()
			open, err := script()
			return rules + open, err
		})
	}
	// Stopped between reading the clock and the kernel's taking it, a caller may have set the
	// timer too late; nothing else would notice.
	if (err == nil || errors.Is(err, ErrTooLate)) && g.cfg.Clock.Now() >= deadline {
		if cerr := g.Close(context.WithoutCancel(ctx)); cerr != nil {
			return fmt.Errorf("open gate: %w", errors.Join(ErrTooLate, cerr))
		}
		err = ErrTooLate
	}
	if err != nil {
		return fmt.Errorf("open gate: %w", err)
	}
	return nil
}

// Close closes the gate at once. Closing a closed gate is no error; closing one that is not
// installed puts it in place, closed.
func (g *Gate) Close(ctx context.Context) error {
	_, err := g.cmd.run(ctx, func() (string, error) {
		return fmt.Sprintf("flush set inet %s open\n", g.cfg.Table), nil
	})
	if err != nil && isMissing(err) {
		err = g.Install(ctx)
	}
	if err != nil {
		return fmt.Errorf("close gate: %w", err)
	}
	return nil
}

// Remove takes the gate away, which leaves the ports open for ever: for removing the software
// from a machine, not for closing. It is idempotent.
func (g *Gate) Remove(ctx context.Context) error {
	_, err := g.cmd.run(ctx, func() (string, error) {
		return fmt.Sprintf("add table inet %[1]s\ndelete table inet %[1]s\n", g.cfg.Table), nil
	})
	if err != nil {
		return fmt.Errorf("remove gate: %w", err)
	}
	return nil
}

// IsOpen reports whether all ports are open and for how long still. A gate that is not
// installed is an error.
func (g *Gate) IsOpen(ctx context.Context) (bool, time.Duration, error) {
	out, err := g.cmd.run(ctx, nil, "list", "set", "inet", g.cfg.Table, "open")
	if err != nil {
		return false, 0, fmt.Errorf("look at gate: %w", err)
	}
	left := map[uint16]time.Duration{}
	for _, m := range expiry.FindAllStringSubmatch(out, -1) {
		port, err1 := strconv.ParseUint(m[1], 10, 16)
		d, err2 := parseNFTTime(m[2])
		if err := errors.Join(err1, err2); err != nil {
			return false, 0, fmt.Errorf("look at gate: %w", err)
		}
		left[uint16(port)] = d
	}
	least := time.Duration(-1)
	for _, p := range g.cfg.Ports {
		d, ok := left[p]
		if !ok || d <= 0 {
			return false, 0, nil
		}
		if least < 0 || d < least {
			least = d
		}
	}
	return least > 0, max(least, 0), nil
}

func (g *Gate) check() error {
	if !tableName.MatchString(g.cfg.Table) {
		return fmt.Errorf("table name %q is not a letter followed by letters, digits, _ and -", g.cfg.Table)
	}
	if len(g.cfg.Ports) == 0 {
		return errors.New("no ports given")
	}
	if g.cfg.Ports[0] == 0 {
		return errors.New("port 0 given")
	}
	return nil
}

// elements is the script that makes the timers run for that many milliseconds from the moment
// at which the kernel takes it. Older kernels don't change an element's timeout, so it is
// taken out and put in again, in one transaction: no packet sees it missing.
func (g *Gate) elements(ms int64) string {
	var b strings.Builder
	for _, p := range g.cfg.Ports {
		fmt.Fprintf(&b, "add element inet %[1]s open { %[2]d timeout 1s }\n"+
			"delete element inet %[1]s open { %[2]d }\n"+
			"add element inet %[1]s open { %[2]d timeout %[3]dms }\n", g.cfg.Table, p, ms)
	}
	return b.String()
}

// ruleset is the script that (re)builds table, sets and chains and leaves running timers alone.
//
// The chains run after connection tracking and before NAT, where a published port still has
// the number that the client used.
//   - Resets pass as they are: no data comes with them, and they are what this gate answers with.
//   - Packets of a client arrive in prerouting (from outside, from containers, and from this
//     machine over loopback), or leave this machine in output before NAT turns them away from it.
//   - Packets of the server: a local process (also Docker's proxy) sends in output from the
//     port itself; a container's answers come through prerouting from the container's own port,
//     and connection tracking knows which port the client asked for.
//
// A client's packet is answered with a reset. A server's packet is turned into one: a client
// that waits for an answer without sending anything would otherwise wait for ever, as nothing
// that the server says, not even that it is dead, could reach it. Data behind a reset is never
// delivered.
func (g *Gate) ruleset() (string, error) {
	ports := make([]string, len(g.cfg.Ports))
	for i, p := range g.cfg.Ports {
		ports[i] = strconv.Itoa(int(p))
	}
	const (
		toUs    = "fib daddr type local tcp dport @ports tcp dport != @open counter reject with tcp reset"
		fromUs  = "tcp sport @ports tcp sport != @open counter tcp flags set rst | ack"
		answers = "ct direction reply ct status dnat meta l4proto tcp ct original proto-dst @ports " +
			"ct original proto-dst != @open counter tcp flags set rst | ack"
	)
	var b strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	t := g.cfg.Table
	line("add table inet %s", t)
	line("add set inet %s ports { type inet_service; }", t)
	line("add set inet %s open { type inet_service; flags timeout; }", t)
	line("flush set inet %s ports", t)
	line("add element inet %s ports { %s }", t, strings.Join(ports, ", "))
	for _, c := range []struct {
		hook  string
		rules []string
	}{
		{"prerouting", []string{toUs, answers}},
		{"output", []string{toUs, fromUs}},
	} {
		line("add chain inet %s %s { type filter hook %[2]s priority -150; policy accept; }", t, c.hook)
		line("flush chain inet %s %s", t, c.hook)
		line("add rule inet %s %s meta l4proto != tcp return", t, c.hook)
		line("add rule inet %s %s tcp flags & rst == rst return", t, c.hook)
		for _, r := range c.rules {
			line("add rule inet %s %s %s", t, c.hook, r)
		}
	}
	return b.String(), nil
}

// expiry finds "5432 timeout 8s expires 7s492ms" in nft's listing of a set.
var expiry = regexp.MustCompile(`(\d+)(?: timeout \S+)? expires (\w+)`)

var nftDays = regexp.MustCompile(`^(\d+)d`)

// parseNFTTime reads nft's notation: Go's, with days.
func parseNFTTime(s string) (time.Duration, error) {
	var days time.Duration
	if m := nftDays.FindStringSubmatch(s); m != nil {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			return 0, fmt.Errorf("parse time %q: %w", s, err)
		}
		days = time.Duration(n) * 24 * time.Hour
		if s = s[len(m[0]):]; s == "" {
			return days, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("parse time of nft: %w", err)
	}
	return days + d, nil
}
