package main

import (
	"context"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	volsync "dbsupervisor/internal/sync"
)

// storeStat is what `snapshots stat` says in JSON. Bytes are of the share unless raw.
type storeStat struct {
	Snapshots      int       `json:"snapshots"`
	Packs          int       `json:"packs"`
	PackBytes      int64     `json:"pack_bytes"`
	LiveBytes      int64     `json:"live_bytes"`
	DeadBytes      int64     `json:"dead_bytes"`
	HeadBytes      int64     `json:"head_bytes"`
	Manifests      int       `json:"manifests"`
	ManifestBytes  int64     `json:"manifest_bytes"`
	Condemned      int       `json:"condemned"`
	CondemnedBytes int64     `json:"condemned_bytes"`
	Stray          int       `json:"stray"`
	StrayBytes     int64     `json:"stray_bytes"`
	RawBytes       int64     `json:"raw_bytes"`
	RawLiveBytes   int64     `json:"raw_live_bytes"`
	RawAllBytes    int64     `json:"raw_all_bytes"`
	Dedup          float64   `json:"dedup_ratio"`
	Compression    float64   `json:"compression_ratio"`
	Ages           []ageStat `json:"ages"`
}

// ageStat is one class of ages.
type ageStat struct {
	Age       string `json:"age"`
	Snapshots int    `json:"snapshots"`
	Packs     int    `json:"packs"`
	PackBytes int64  `json:"pack_bytes"`
	LiveBytes int64  `json:"live_bytes"`
}

func (a *app) statCmd() *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "stat",
		Short: "Say what the store's room is used for: live, dead and condemned, by age; what compression and sharing save",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, snaps, err := a.snapshotsOf(cmd.Context(), "", "")
			if err != nil {
				return err
			}
			var st volsync.StoreStats
			m := newMeter(a.err)
			err = a.pinned(cmd.Context(), r, nil, "snapshots stat", func(ctx context.Context) error {
				var cat volsync.CatalogRef
				if _, cat, err = r.look(ctx); err != nil {
					return err
				}
				if snaps, err = r.list(ctx); err != nil {
					return err
				}
				st, err = r.store.Stat(ctx, snaps, cat, m)
				return err
			})
			m.done()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(a.out, statRow(st))
			}
			return a.showStat(st)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func statRow(st volsync.StoreStats) storeStat {
	out := storeStat{Snapshots: st.Snapshots, Packs: st.Packs, PackBytes: st.Bytes, LiveBytes: st.LiveBytes, DeadBytes: st.DeadBytes,
		HeadBytes: st.HeadBytes, Manifests: st.Manifests, ManifestBytes: st.ManifestBytes, Condemned: st.Condemned,
		CondemnedBytes: st.CondemnedBytes, Stray: st.Stray, StrayBytes: st.StrayBytes, RawBytes: st.RawBytes,
		RawLiveBytes: st.RawLiveBytes, RawAllBytes: st.RawAllBytes, Dedup: st.Dedup(), Compression: st.Compression()}
	for _, g := range st.Ages {
		out.Ages = append(out.Ages, ageStat{Age: ageName(g.UpTo), Snapshots: g.Snapshots, Packs: g.Packs, PackBytes: g.Bytes, LiveBytes: g.LiveBytes})
	}
	return out
}

func ageName(upTo time.Duration) string {
	switch upTo {
	case 0:
		return "older"
	case time.Hour:
		return "hour"
	case 24 * time.Hour:
		return "day"
	}
	return "week"
}

func (a *app) showStat(st volsync.StoreStats) error {
	tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "snapshots\t%d\t\n", st.Snapshots)
	fmt.Fprintf(tw, "packs\t%d\t%s\n", st.Packs, bytes(st.Bytes))
	fmt.Fprintf(tw, "  live\t\t%s\tneeded by a retained snapshot\n", bytes(st.LiveBytes))
	fmt.Fprintf(tw, "  of it head\t\t%s\tneeded by the newest\n", bytes(st.HeadBytes))
	fmt.Fprintf(tw, "  dead\t\t%s\tin packs that are needed for other blocks\n", bytes(st.DeadBytes))
	fmt.Fprintf(tw, "manifests\t%d\t%s\n", st.Manifests, bytes(st.ManifestBytes))
	fmt.Fprintf(tw, "condemned\t%d\t%s\tto be deleted\n", st.Condemned, bytes(st.CondemnedBytes))
	fmt.Fprintf(tw, "stray\t%d\t%s\tunder way, or left over\n", st.Stray, bytes(st.StrayBytes))
	fmt.Fprintf(tw, "compression\t%.2f\n", st.Compression())
	fmt.Fprintf(tw, "sharing\t%.2f\tas large if each snapshot had its own blocks\n", st.Dedup())
	fmt.Fprintln(tw)
	fmt.Fprintln(tw, "AGE UP TO\tSNAPSHOTS\tPACKS\tSTORED\tLIVE")
	for _, g := range st.Ages {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%s\t%s\n", ageName(g.UpTo), g.Snapshots, g.Packs, bytes(g.Bytes), bytes(g.LiveBytes))
	}
	return tw.Flush()
}
