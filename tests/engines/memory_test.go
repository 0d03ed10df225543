package engines

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/workload"
)

// TestMemoryTables: rows that are in no file are there after the loss of the primary, as of
// head and of the same moment as the rows that are in files; after a crash in place; after a
// planned move none is missing. A restart of the agent does not load them again.
func TestMemoryTables(t *testing.T) {
	e, err := workload.Find("mariadb")
	must(t, err)
	e.Setup += "create table shop.mem (n bigint) engine=MEMORY;\n"
	e.Write = func(n int64) string {
		return fmt.Sprintf("insert into shop.mem values (%d); insert into shop.acked values (%d); select 'stored', n from shop.acked where n = %d;\n", n, n, n)
	}
	e.Database += "  env: {MEMORY_TABLES_MAX: \"4000000\"}\n"
	r := newRig(t, e)
	a := r.primary()
	w := r.k.StartWriter(r.ctx, 0)
	defer w.Stop()
	r.waitWrites(w, a, 50)
	b := r.standby()
	safe := r.sync(a)
	must(t, a.Crash(r.ctx))
	must(t, second(r.WaitPrimary(r.ctx, a)))
	acks := w.Stop()
	r.checkLoss(b, acks, safe)

	// Each number goes into the MEMORY table first: at one moment it is at most one ahead.
	count := func(on *cluster.Instance) (mem, doubled, ahead int64) {
		t.Helper()
		out, err := r.k.Do(r.ctx, on, `select count(*), count(*) - count(distinct n),
			(select max(n) from shop.mem) - (select max(n) from shop.acked) from shop.mem;`)
		must(t, err)
		for i, f := range strings.Fields(out) {
			n, err := strconv.ParseInt(f, 10, 64)
			must(t, err)
			*[]*int64{&mem, &doubled, &ahead}[i] = n
		}
		return mem, doubled, ahead
	}
	mem, doubled, ahead := count(b)
	t.Logf("after the loss of the primary: %d rows, %d twice, %d ahead of InnoDB's", mem, doubled, ahead)
	if mem < 50 || doubled != 0 || ahead < 0 || ahead > 1 {
		t.Errorf("%d rows, %d twice, %d ahead of InnoDB's: not of one moment", mem, doubled, ahead)
	}

	// A crash in place: as of the last snapshot.
	r.sync(b)
	id, err := b.Container(r.ctx)
	must(t, err)
	r.docker("kill", id)
	r.until("the database runs again", func() bool {
		now, err := b.Container(r.ctx)
		return err == nil && now != "" && now != id && b.Is(r.ctx, "primary")
	})
	if again, doubled, _ := count(b); again != mem || doubled != 0 {
		t.Errorf("after a crash in place %d rows, %d twice, want %d", again, doubled, mem)
	}

	// What was written since would be gone if a new agent loaded again.
	must(t, second(r.k.Do(r.ctx, b, "insert into shop.mem values (1000001);")))
	must(t, b.SignalAgent(syscall.SIGKILL))
	_ = b.WaitAgent(r.ctx)
	must(t, b.StartAgent())
	r.until("the agent has taken over", func() bool { return b.Is(r.ctx, "primary") })
	if again, _, _ := count(b); again != mem+1 {
		t.Errorf("after a restart of the agent %d rows, want %d", again, mem+1)
	}

	// A planned move loses nothing, and no snapshot comes before it by chance.
	must(t, a.Start())
	must(t, a.WaitWarm(r.ctx))
	must(t, second(r.k.Do(r.ctx, b, "insert into shop.mem values (1000002), (1000003);")))
	must(t, second(b.CLI(r.ctx, "switchover")))
	must(t, second(r.WaitPrimary(r.ctx, b)))
	if again, doubled, _ := count(a); again != mem+3 || doubled != 0 {
		t.Errorf("after a planned move %d rows, %d twice, want %d", again, doubled, mem+3)
	}

	// More than may be kept: no snapshot, and the reason is told.
	must(t, second(r.k.Do(r.ctx, a, "use shop; insert into mem select seq from seq_1_to_400000;")))
	if out, err := a.CLI(r.ctx, "sync"); err == nil || !strings.Contains(err.Error(), "MEMORY_TABLES_MAX") {
		t.Errorf("a snapshot with too many rows: %v %s", err, out)
	}
	// They are not left locked.
	began := time.Now()
	must(t, second(r.k.Do(r.ctx, a, "truncate table shop.mem;")))
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the table was locked for %s after a snapshot that failed", took)
	}
	r.sync(a)
}
