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
	"time"

	"dbsupervisor/tests/efssim"
	"dbsupervisor/tests/efssim/opscript"
)

// tally is what steps cost: requests by step and by operation.
type tally map[string]map[string]int

func (c tally) add(step string, before, after map[string]int) {
	c[step] = map[string]int{}
	for op, n := range after {
		if n -= before[op]; n > 0 {
			// The client names an OPEN that it sends without asking for attributes apart.
			c[step][strings.TrimSuffix(op, "_NOATTR")] += n
		}
	}
}

func (c tally) total(op string) (n int) {
	for _, step := range c {
		n += step[op]
	}
	return n
}

// TestCounts runs the fixed script on the mount and on the simulated share, and shows what it
// costs by operation: as the client counts, as the server does, and as the simulation has it.
func TestCounts(t *testing.T) {
	p := build(t)
	s := newServer(t)
	g := startGuests(t, p, s, "alpha")[0]
	steps := ask[[]Named](g, "StepNames", None{})
	client := tally{}
	begin := s.counts(t)
	for i, step := range steps {
		if step.Cold {
			ask[None](g, "Remount", g.nfs)
		}
		before := ask[map[string]int](g, "Mountstats", None{})
		ask[None](g, "Step", i)
		client.add(step.Name, before, ask[map[string]int](g, "Mountstats", None{}))
	}
	server := tally{}
	server.add("all", begin, s.counts(t))
	simulated := simulate(t)

	text := table(steps, client, simulated)
	t.Log("requests of the client / of the simulated one\n" + text)
	line := ""
	for _, op := range slices.Sorted(maps.Keys(server["all"])) {
		line += fmt.Sprintf("%s %d, ", op, server["all"][op])
	}
	t.Log("operations as the server counts them, mounting included: " + strings.TrimSuffix(line, ", "))

	for _, op := range []string{"OPEN", "CLOSE", "WRITE", "READ", "SYMLINK", "LINK", "REMOVE", "CREATE"} {
		real, sim := client.total(op), simulated.total(op)
		served, asked := server.total(op), real
		if op == "SYMLINK" { // the same operation as making a directory
			served, asked = server.total("CREATE"), real+client.total("CREATE")
		}
		if real == 0 || served < asked {
			t.Errorf("%d %s of the client, %d of the server", real, op, served)
		}
		// READ differs with the client's read-ahead; a slow machine's client may send what is
		// dirty before it has all of it.
		more := 0
		if op == "WRITE" {
			more = sim / 4
		}
		if op != "READ" && (real < sim || real > sim+more) {
			t.Errorf("%d %s of the client, %d of the simulated one", real, op, sim)
		}
	}
	dir := filepath.Join("..", "..", "build", "nfs")
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "counts.md"), []byte(text), 0o600))
	out, err := json.MarshalIndent(map[string]tally{"client": client, "simulated": simulated, "server": server}, "", " ")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "counts.json"), out, 0o600))
}

// simulate runs the script on the simulated share.
func simulate(t *testing.T) tally {
	t.Helper()
	share, backing := t.TempDir(), t.TempDir()
	// Attributes are believed for so long that this machine's pace does not count.
	r, err := efssim.SpawnWith(backing, share, efssim.Options{Volatile: true,
		AttrMin: time.Hour, AttrMax: time.Hour, DirMin: time.Hour, DirMax: time.Hour})
	must(t, err)
	defer func() { must(t, r.Close()) }()
	wire := func() map[string]int {
		st, err := r.Stats()
		must(t, err)
		out := map[string]int{}
		for op, n := range st.NFS.Ops {
			out[string(op)] = int(n)
		}
		return out
	}
	// Not the mount's root, which a client asks about now and then: as in the guest.
	at := filepath.Join(share, "script")
	must(t, os.Mkdir(at, 0o700))
	script, c := opscript.New(at, t.TempDir()), tally{}
	defer func() { must(t, script.Close()) }()
	for _, step := range script.Steps() {
		if step.Cold {
			must(t, r.Forget())
		}
		before := wire()
		if err := step.Run(t.Context()); err != nil {
			t.Fatalf("%s on the simulated share: %v", step.Name, err)
		}
		c.add(step.Name, before, wire())
	}
	return c
}

// table is Markdown: a row for each step, "client / simulated" in each column.
func table(steps []Named, client, simulated tally) string {
	seen := map[string]bool{}
	for _, c := range []tally{client, simulated} {
		for _, step := range c {
			for op := range step {
				seen[op] = true
			}
		}
	}
	ops := slices.Sorted(maps.Keys(seen))
	var b strings.Builder
	fmt.Fprintf(&b, "| step | all | %s |\n|%s\n", strings.Join(ops, " | "), strings.Repeat(" --- |", len(ops)+2))
	for _, step := range steps {
		all := [2]int{}
		cells := make([]string, 0, len(ops))
		for _, op := range ops {
			real, sim := client[step.Name][op], simulated[step.Name][op]
			all[0] += real
			all[1] += sim
			switch {
			case real == 0 && sim == 0:
				cells = append(cells, "")
			case real == sim:
				cells = append(cells, fmt.Sprint(real))
			default:
				cells = append(cells, fmt.Sprintf("%d / %d", real, sim))
			}
		}
		fmt.Fprintf(&b, "| %s | %d / %d | %s |\n", step.Name, all[0], all[1], strings.Join(cells, " | "))
	}
	return b.String()
}
