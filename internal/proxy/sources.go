package proxy

import (
	"net/netip"
	"sync"
)

// sources counts the clients by their addresses.
type sources struct {
	most, mostOne int

	mu  sync.Mutex
	all int
	by  map[netip.Addr]int
}

func newSources(most, mostOne int) *sources {
	return &sources{most: most, mostOne: mostOne, by: map[netip.Addr]int{}}
}

// enter counts a client in; why it may not come in, "" if it may.
func (s *sources) enter(a netip.Addr) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.all >= s.most:
		return "limit"
	case s.mostOne > 0 && s.by[a] >= s.mostOne:
		return "source_limit"
	}
	s.all++
	s.by[a]++
	return ""
}

// leave is the end of a client that has come in.
func (s *sources) leave(a netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.by[a]--; s.by[a] == 0 {
		delete(s.by, a)
	}
}

func (s *sources) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all
}
