package supervisor

import (
	"fmt"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/lease"
)

func TestAges(t *testing.T) {
	view := func(id string, made boottime.Instant, age time.Duration, edit ...func(*lease.View)) lease.View {
		v := lease.View{Loaded: true, MadeAfter: made, Record: lease.Record{
			Holder: lease.Holder{Incarnation: "i"}, By: "i", Head: &lease.Head{ID: id}, HeadAge: lease.Duration(age)}}
		for _, e := range edit {
			e(&v)
		}
		return v
	}
	at := boottime.Instant(time.Hour)
	var a ages
	unknown := func(what string, v lease.View) {
		t.Helper()
		a.note(v)
		if got, ok := a.of("x"); ok {
			t.Errorf("%s: known to be of %d", what, got)
		}
	}
	unknown("no moment", view("x", 0, time.Second))
	unknown("nothing vouched for", view("x", at, 0))
	unknown("by somebody else", view("x", at, time.Second, func(v *lease.View) { v.Record.By = "o" }))
	unknown("another head", view("y", at, time.Second))
	unknown("no head", view("x", at, time.Second, func(v *lease.View) { v.Record.Head = nil }))
	is := func(what string, want boottime.Instant) {
		t.Helper()
		if got, ok := a.of("x"); !ok || got != want {
			t.Errorf("%s: %d, %t, want %d", what, got, ok, want)
		}
	}
	a.note(view("x", at, 3*time.Second))
	is("vouched for", at.Add(-3*time.Second))
	a.note(view("x", at.Add(time.Second), 5*time.Second))
	is("a record that knows less", at.Add(-3*time.Second))
	a.note(view("x", at.Add(time.Minute), time.Second))
	is("an idle database", at.Add(59*time.Second))
	for i := range keepAges {
		a.note(view(fmt.Sprint(i), at, time.Second))
	}
	if _, ok := a.of("x"); ok || len(a.fresh) != keepAges {
		t.Errorf("%d heads are remembered", len(a.fresh))
	}
}

func TestAgeSince(t *testing.T) {
	for give, want := range map[time.Duration]time.Duration{
		0: time.Millisecond, -time.Second: time.Millisecond, 1500 * time.Microsecond: 2 * time.Millisecond, time.Second: 1001 * time.Millisecond,
	} {
		at := boottime.Instant(time.Hour)
		if got := time.Duration(ageSince(at.Add(give), at)); got != want {
			t.Errorf("%s: %s, want %s", give, got, want)
		}
	}
}
