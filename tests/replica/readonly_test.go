package replica

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// A superuser can't write to a replica, nor make it take writes.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	_, p, s := start(t, "  interval: 1s\n")
	ctx := t.Context()
	write(t, p, "create table a as select 7 as n")
	within(t, time.Minute, "the table on the replica", func() bool {
		n, err := ask(ctx, s, "select n from a")
		return err == nil && n == 7
	})
	conn := connect(t, s.ReadURL(ownAddress(t)))
	for _, sql := range []string{
		"insert into a values (8)", "create table b (n int)", "create temporary table b (n int)",
		"set default_transaction_read_only = off; set transaction_read_only = off; delete from a", "begin read write; delete from a",
		"vacuum a", "select nextval('no_such_sequence')", "alter system set primary_conninfo = 'host=x'; alter user postgres password 'x'",
		"copy a from program 'echo 9'", "reindex table a", "select pg_switch_wal()", "checkpoint; delete from a",
	} {
		if _, err := conn.Exec(ctx, sql); err == nil {
			t.Errorf("%q was allowed", sql)
		}
		_, _ = conn.Exec(ctx, "rollback")
	}
	seq := ""
	must(t, conn.QueryRow(ctx, "show dbsupervisor.seq").Scan(&seq))
	if seq == "" || seq == "0" {
		t.Errorf("snapshot's number inside of the database: %q", seq)
	}
	// What is not SQL: programs that the server runs for a superuser.
	for _, sh := range []string{
		"rm -f $PGDATA/standby.signal", "mv $PGDATA/standby.signal $PGDATA/x", "echo x > $PGDATA/standby.signal", "umount $PGDATA/standby.signal",
	} {
		if _, err := conn.Exec(ctx, "copy (select 1) to program '"+sh+"'"); err == nil {
			t.Errorf("%q succeeded", sh)
		}
	}
	for _, sql := range []string{"select pg_promote(true, 10)", "copy (select 1) to program 'touch $PGDATA/promote; kill -USR1 1; sleep 5'"} {
		promote(t, sql, s.ReadURL("127.0.0.1"))
		within(t, time.Minute, "a new copy after a promotion", func() bool {
			n, err := ask(ctx, s, "select n from a")
			return err == nil && n == 7 && s.Is(ctx, "replica")
		})
	}
	if n, err := ask(ctx, s, "select count(*)::int from a"); err != nil || n != 1 {
		t.Errorf("%d rows on the replica, %v", n, err)
	}
	if st, err := s.Status(ctx); err != nil || st.Local.Phase != "clean" || st.Role != "standby" {
		t.Errorf("the warm copy: %+v, %v", st.Local, err)
	}
}

// promote tries to make a copy take writes while others try to write all the time.
func promote(t *testing.T, sql, url string) {
	t.Helper()
	ctx := t.Context()
	conn, err := pgx.Connect(ctx, url)
	must(t, err)
	writer, err := pgx.Connect(ctx, url)
	must(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			_, err := writer.Exec(ctx, "insert into a values (99)")
			if err == nil {
				t.Errorf("a write was taken after %q", sql)
				return
			}
			if !strings.Contains(err.Error(), "read-only") {
				return // the copy is gone
			}
		}
	}()
	_, err = conn.Exec(ctx, sql)
	t.Logf("%s: %v", sql, err)
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Errorf("the copy survived %q", sql)
	}
	_ = conn.Close(ctx)
	_ = writer.Close(ctx)
}

// ownAddress is an address of this machine that is not loopback.
func ownAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	must(t, err)
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() {
			return n.IP.String()
		}
	}
	t.Skip("this machine has no address but loopback")
	return ""
}
