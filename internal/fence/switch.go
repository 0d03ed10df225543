package fence

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// switchPriority makes the switch translate before Docker's own rules do.
const switchPriority = -110

// SwitchConfig describes the stable ports of one instance.
type SwitchConfig struct {
	// Table is the nftables table that the switch owns, of the ip family: named like a Gate's.
	Table string
	Ports []SwitchPort
	// NFT is the command with leading arguments; default nft.
	NFT []string
}

// SwitchPort is one stable TCP port of this machine.
type SwitchPort struct {
	Port    uint16
	Address string // IPv4 address of this machine; "" means all of them
}

// Target is where one stable port leads.
type Target struct {
	Port uint16 // the stable port
	// To is the container's own address and port, for whoever comes from outside or uses an
	// address of this machine.
	To netip.AddrPort
	// Near is a port of 127.0.0.1 that leads to the same place, for this machine's own
	// connections to a loopback address; 0 means that these are refused.
	Near uint16
}

// Switch leads stable TCP ports of this machine to one container after the other, in the
// kernel. A change is one transaction: each new connection goes to the old target or to the new
// one and none is refused, and connections that exist stay with the one they have, through
// connection tracking, until that ends. A port that leads nowhere is closed. IPv4 only.
//
// Connections from containers of the target's own Docker network are not led back into it.
type Switch struct {
	cfg SwitchConfig
	cmd nftCommand
}

// NewSwitch returns a switch; nothing is changed before Install.
func NewSwitch(cfg SwitchConfig) *Switch {
	if len(cfg.NFT) == 0 {
		cfg.NFT = []string{"nft"}
	}
	return &Switch{cfg: cfg, cmd: nftCommand{argv: cfg.NFT}}
}

// Install puts the rules in place in one transaction and leaves targets that are there.
func (w *Switch) Install(ctx context.Context) error {
	if err := w.check(); err != nil {
		return fmt.Errorf("install switch: %w", err)
	}
	if _, err := w.cmd.run(ctx, func() (string, error) { return w.ruleset(), nil }); err != nil {
		return fmt.Errorf("install switch: %w", err)
	}
	return nil
}

// Lead makes the stable ports lead to these targets and to no others; none closes them all.
// Rules that somebody has removed are put back.
func (w *Switch) Lead(ctx context.Context, targets ...Target) error {
	if err := w.check(); err != nil {
		return fmt.Errorf("switch ports: %w", err)
	}
	for _, t := range targets {
		if !t.To.Addr().Is4() || t.To.Port() == 0 {
			return fmt.Errorf("switch ports: port %d can't lead to %s", t.Port, t.To)
		}
	}
	// The rules are part of it: they cost nothing and may have been flushed.
	if _, err := w.cmd.run(ctx, func() (string, error) { return w.ruleset() + w.elements(targets), nil }); err != nil {
		return fmt.Errorf("switch ports: %w", err)
	}
	return nil
}

// Leads tells where the stable ports lead now: what an agent finds that was started anew. A
// switch that is not installed leads nowhere.
func (w *Switch) Leads(ctx context.Context) ([]Target, error) {
	var targets []Target
	far, err := w.cmd.run(ctx, nil, "list", "map", "ip", w.cfg.Table, "far")
	if isMissing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at switch: %w", err)
	}
	near, err := w.cmd.run(ctx, nil, "list", "map", "ip", w.cfg.Table, "near")
	if err != nil {
		return nil, fmt.Errorf("look at switch: %w", err)
	}
	local, err := parseLeads(near)
	if err != nil {
		return nil, fmt.Errorf("look at switch: %w", err)
	}
	to, err := parseLeads(far)
	if err != nil {
		return nil, fmt.Errorf("look at switch: %w", err)
	}
	for _, p := range w.cfg.Ports {
		if at, ok := to[p.Port]; ok {
			targets = append(targets, Target{Port: p.Port, To: at, Near: local[p.Port].Port()})
		}
	}
	return targets, nil
}

// Remove takes the switch away: the ports are closed. It is idempotent.
func (w *Switch) Remove(ctx context.Context) error {
	_, err := w.cmd.run(ctx, func() (string, error) {
		return fmt.Sprintf("add table ip %[1]s\ndelete table ip %[1]s\n", w.cfg.Table), nil
	})
	if err != nil {
		return fmt.Errorf("remove switch: %w", err)
	}
	return nil
}

func (w *Switch) check() error {
	if !tableName.MatchString(w.cfg.Table) {
		return fmt.Errorf("table name %q is not a letter followed by letters, digits, _ and -", w.cfg.Table)
	}
	if len(w.cfg.Ports) == 0 {
		return errors.New("no ports given")
	}
	for _, p := range w.cfg.Ports {
		if p.Address == "" {
			continue
		}
		if a, err := netip.ParseAddr(p.Address); err != nil || !a.Is4() {
			return fmt.Errorf("%q is not an IPv4 address", p.Address)
		}
	}
	return nil
}

// ruleset is the script that (re)builds table, maps and chains and leaves the maps' elements.
//
// What comes from outside is led to the container's own address. So is what this machine sends
// to one of its own addresses; but a packet with a loopback address for its source may not leave
// over a bridge, so connections to loopback are led to a port of loopback instead.
func (w *Switch) ruleset() string {
	var b strings.Builder
	t := w.cfg.Table
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	line("add table ip %s", t)
	for _, m := range []string{"far", "near"} {
		line("add map ip %s %s { type inet_service : ipv4_addr . inet_service; }", t, m)
	}
	for _, hook := range []string{"prerouting", "output"} {
		line("add chain ip %s %s { type nat hook %[2]s priority %[3]d; policy accept; }", t, hook, switchPriority)
		line("flush chain ip %s %s", t, hook)
		for _, p := range w.cfg.Ports {
			to := "fib daddr type local"
			if p.Address != "" {
				to = "ip daddr " + p.Address
			}
			if hook == "output" {
				line("add rule ip %s %s %s ip daddr 127.0.0.0/8 tcp dport %d dnat ip to tcp dport map @near", t, hook, to, p.Port)
			}
			line("add rule ip %s %s %s ip daddr != 127.0.0.0/8 tcp dport %d dnat ip to tcp dport map @far", t, hook, to, p.Port)
		}
	}
	return b.String()
}

// elements is the script that replaces the maps' elements.
func (w *Switch) elements(targets []Target) string {
	var b strings.Builder
	for _, m := range []string{"far", "near"} {
		fmt.Fprintf(&b, "flush map ip %s %s\n", w.cfg.Table, m)
	}
	for _, t := range targets {
		fmt.Fprintf(&b, "add element ip %s far { %d : %s . %d }\n", w.cfg.Table, t.Port, t.To.Addr(), t.To.Port())
		if t.Near != 0 {
			fmt.Fprintf(&b, "add element ip %s near { %d : 127.0.0.1 . %d }\n", w.cfg.Table, t.Port, t.Near)
		}
	}
	return b.String()
}

// leads finds "5433 : 172.17.0.3 . 5432" in nft's listing of a map.
var leads = regexp.MustCompile(`(\d+) : ([0-9.]+) \. (\d+)`)

func parseLeads(text string) (map[uint16]netip.AddrPort, error) {
	out := map[uint16]netip.AddrPort{}
	for _, m := range leads.FindAllStringSubmatch(text, -1) {
		from, err1 := strconv.ParseUint(m[1], 10, 16)
		to, err2 := netip.ParseAddrPort(m[2] + ":" + m[3])
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("parse map: %w", err)
		}
		out[uint16(from)] = to
	}
	return out, nil
}
