package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
)

// stamp is how moments are shown: whoever reads logs of several machines needs one zone.
const stamp = "2006-01-02 15:04:05Z"

func (a *app) historyCmd() *cobra.Command {
	n := 30
	asJSON := false
	cmd := &cobra.Command{
		Use:   "history",
		Short: "Show what happened: every transition",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, c, err := a.client()
			if err != nil {
				return err
			}
			events, err := c.History(cmd.Context(), n)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(a.out, events)
			}
			return printEvents(a.out, events)
		},
	}
	cmd.Flags().IntVarP(&n, "lines", "n", n, "how many entries; 0 for all")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func printEvents(w io.Writer, events []api.Event) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, e := range events {
		fmt.Fprintf(tw, "%s\tterm %d\t%s\t%s\n", e.At.UTC().Format(stamp), e.Term, e.Kind, eventText(e))
	}
	return tw.Flush()
}

// eventText is what an entry says, with the move that it tells of, if any, before it.
func eventText(e api.Event) string {
	if e.From == "" && e.To == "" {
		return e.Text
	}
	text := orDash(e.From) + " -> " + orDash(e.To)
	if e.Text != "" {
		text += ": " + e.Text
	}
	return text
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func (a *app) forksCmd() *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "forks",
		Short: "List data that was set aside because history went on without it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, c, err := a.client()
			if err != nil {
				return err
			}
			forks, err := c.Forks(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(a.out, forks)
			}
			if len(forks) == 0 {
				_, err = fmt.Fprintln(a.out, "there are no forks")
				return err
			}
			tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(tw, "SET ASIDE\tTERM\tDESCENDS FROM\tKEPT UNTIL\tPATH\tWHY")
			for _, f := range forks {
				until := "-"
				if !f.ExpiresAt.IsZero() {
					until = f.ExpiresAt.UTC().Format(time.DateOnly)
				}
				fmt.Fprintf(tw, "%s\t%d\t%s\t%s\t%s\t%s\n", f.At.UTC().Format(stamp), f.Term, orDash(f.Base), until, f.Path, f.Reason)
			}
			return tw.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	list := &cobra.Command{Use: "list", Short: cmd.Short, Args: cobra.NoArgs, RunE: cmd.RunE}
	list.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.AddCommand(list)
	return cmd
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
