package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

func TestMembers(t *testing.T) {
	share := t.TempDir()
	clock := boottime.NewFake()
	const window = 10 * time.Second
	n := 0
	beat := func(ms *members, m Member) {
		t.Helper()
		n++
		if err := ms.beat(m, fmt.Sprint("nonce", n)); err != nil {
			t.Fatal(err)
		}
	}
	a, b := newMembers(fsx.OS{}, share, clock), newMembers(fsx.OS{}, share, clock)
	self := Member{Instance: "a"}
	beat(b, Member{Instance: "b", Eligible: true, BaseSeq: 4})
	beat(a, self)
	if got := a.alive(window); len(got) != 0 {
		t.Errorf("a file that was there before our first look may be of a dead instance, got %+v", got)
	}
	beat(b, Member{Instance: "b", Eligible: true, BaseSeq: 5})
	newMembers(fsx.OS{}, share, clock) // one that never beats is nobody
	beat(newMembers(fsx.OS{}, share, clock), Member{Instance: "c", Eligible: true, BaseSeq: 7})
	beat(newMembers(fsx.OS{}, share, clock), Member{Instance: "d", Eligible: false, BaseSeq: 9})
	if err := a.refresh("a"); err != nil {
		t.Fatal(err)
	}
	if got := a.alive(window); len(got) != 3 {
		t.Errorf("want b, c and d alive, got %+v", got)
	}
	for want, expect := range map[string]string{"": "c", "b": "b", "d": "", "nobody": ""} {
		m, ok := a.successor(want, "", window)
		if m.Instance != expect || ok != (expect != "") {
			t.Errorf("successor(%q) = %q, %v; want %q", want, m.Instance, ok, expect)
		}
	}
	clock.Advance(window + time.Second)
	if got := a.alive(window); len(got) != 0 {
		t.Errorf("silent instances still count as alive: %+v", got)
	}
	// Every beat replaces the one before: nothing piles up on the share.
	for range 20 {
		beat(a, self)
	}
	files, err := os.ReadDir(filepath.Join(share, "members"))
	if err != nil {
		t.Fatal(err)
	}
	own := 0
	for _, f := range files {
		if strings.HasPrefix(f.Name(), "a"+memberSeparator) {
			own++
		}
	}
	if own != 1 {
		t.Errorf("%d files of one instance, want 1", own)
	}
}

// TestMembersHalfWritten: a beat that is still being written is not believed.
func TestMembersHalfWritten(t *testing.T) {
	share := t.TempDir()
	ms := newMembers(fsx.OS{}, share, boottime.NewFake())
	if err := ms.beat(Member{Instance: "a"}, "x"); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(share, "members", "b~0000000000000001~x")
	if err := os.WriteFile(name, []byte(`{"instance":"b","elig`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ms.refresh("a"); err != nil {
		t.Fatal(err)
	}
	if got := ms.alive(time.Hour); len(got) != 0 {
		t.Errorf("half a beat was believed: %+v", got)
	}
	if err := os.WriteFile(name, []byte(`{"instance":"b","eligible":true}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ms.refresh("a"); err != nil {
		t.Fatal(err)
	}
	if got := ms.alive(time.Hour); len(got) != 1 {
		t.Errorf("the whole beat was not seen: %+v", got)
	}
}

// TestMembersBudget: an instance without news costs the share four requests a beat (the listing,
// a name more, a name less), a primary without news changes nothing on it, and what was read
// once is not read again.
func TestMembersBudget(t *testing.T) {
	share, clock := t.TempDir(), boottime.NewFake()
	var ops []fsx.Op
	counted := &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, _ string) error { ops = append(ops, op); return nil }}
	a, b := newMembers(counted, share, clock), newMembers(counted, share, clock)
	n := 0
	beat := func(ms *members, m Member, want ...fsx.Op) {
		t.Helper()
		n++
		ops = nil
		if err := ms.beat(m, fmt.Sprint("nonce", n)); err != nil {
			t.Fatal(err)
		}
		if want != nil && !slices.Equal(ops, want) {
			t.Errorf("operations %v, want %v", ops, want)
		}
	}
	standby, primary := Member{Instance: "b", State: StateStandby, Eligible: true}, Member{Instance: "a", State: StatePrimary}
	beat(b, standby)
	beat(a, primary)
	beat(b, standby) // reads the other's, once
	for range 3 {
		beat(b, standby, fsx.OpReadDir, fsx.OpLink, fsx.OpRemove)
		beat(a, primary, fsx.OpReadDir)
		if got := a.alive(time.Second); len(got) != 1 || !got[0].Eligible {
			t.Fatalf("the standby that beats without news is not seen: %+v", got)
		}
		clock.Advance(10 * time.Second)
	}
	standby.BaseSeq = 7
	beat(b, standby, fsx.OpReadDir, fsx.OpCreate, fsx.OpWrite, fsx.OpClose, fsx.OpRemove)
	beat(a, primary)
	if got := a.alive(time.Second); len(got) != 1 || got[0].BaseSeq != 7 {
		t.Errorf("news is not seen: %+v", got)
	}
}
