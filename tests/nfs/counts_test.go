package nfs_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestCounts runs the fixed script on the mount and shows what it costs, by operation: as the
// client counts, and as the server does. build/nfs/opscript.json gets it, for a comparison
// with the simulated share.
func TestCounts(t *testing.T) {
	p := build(t)
	s := newServer(t)
	g := startGuests(t, p, s, "alpha")[0]
	steps := ask[[]Named](g, "StepNames", None{})
	client := map[string]map[string]int{} // by step, by operation
	total := map[string]int{}
	begin := s.counts(t)
	for i, step := range steps {
		if step.Cold {
			ask[None](g, "Remount", g.nfs)
		}
		before := ask[map[string]int](g, "Mountstats", None{})
		ask[None](g, "Step", i)
		after := ask[map[string]int](g, "Mountstats", None{})
		client[step.Name] = map[string]int{}
		for op, n := range after {
			if n -= before[op]; n > 0 {
				client[step.Name][op] = n
				total[op] += n
			}
		}
	}
	end := s.counts(t)
	server := map[string]int{}
	for op, n := range end {
		if n -= begin[op]; n > 0 {
			server[op] = n
		}
	}
	var b strings.Builder
	ops := slices.Sorted(maps.Keys(total))
	fmt.Fprintf(&b, "requests of the client\n%-24s", "")
	for _, op := range ops {
		fmt.Fprintf(&b, "%12s", op)
	}
	for _, step := range steps {
		fmt.Fprintf(&b, "\n%-24s", step.Name)
		for _, op := range ops {
			fmt.Fprintf(&b, "%12d", client[step.Name][op])
		}
	}
	fmt.Fprintf(&b, "\noperations of the server, mounting included\n")
	for _, op := range slices.Sorted(maps.Keys(server)) {
		fmt.Fprintf(&b, "%s %d  ", op, server[op])
	}
	t.Log(b.String())
	for _, op := range []string{"OPEN", "WRITE", "READ", "LINK", "REMOVE"} {
		if total[op] == 0 {
			t.Errorf("the client counted no %s", op)
		}
		if server[op] < total[op] {
			t.Errorf("%d %s of the client, %d of the server", total[op], op, server[op])
		}
	}
	out, err := json.MarshalIndent(client, "", " ")
	must(t, err)
	dir := filepath.Join("..", "..", "build", "nfs")
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "opscript.json"), out, 0o600))
}
