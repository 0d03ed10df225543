package track

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Offsets in the value of the map "control", as bpf/track.c lays it out.
const (
	ctlEpoch    = 0
	ctlHead     = 16
	ctlSettled  = 24 // ours from here on
	ctlForgot   = 32
	ctlLostSeen = 40
	ctlMissSeen = 48
	ctlTail     = 64
	ctlLost     = 72
	ctlIdentity = 88
	ctlBusy     = 128
	cpus        = 256
	ctlSize     = ctlBusy + cpus*64

	slotSize = 64
)

// kernel is the part that lives in the kernel: programs, maps, links.
type kernel struct {
	control, ring []byte // mapped
	maps          map[string]*ebpf.Map
	progs         map[string]*ebpf.Program
	links         map[string]link.Link
	slots         uint64

	next  uint64 // first slot that may not have been drained
	epoch uint64 // last epoch that has been drained
}

const (
	mapPrefix  = "map_"
	progPrefix = "prog_"
	linkPrefix = "link_"
)

// openKernel takes up what is pinned, or loads anew and says why.
func openKernel(cfg Config, mount mountID) (*kernel, string, error) {
	cache := btf.NewCache()
	have, err := available(cache, mount.fsType)
	if err != nil {
		return nil, "", err
	}
	slots := uint64(1) << bits.Len64(uint64(max(cfg.Slots, 64))-1)
	identity := identityOf(cfg.Key, mount, slots, have)
	fresh := "tracking began"
	if cfg.Pin != "" {
		if err := mountBPF(cfg.Pin); err != nil {
			return nil, "", err
		}
		k, why := takeUp(cfg.Pin, identity, slots, have)
		if k != nil {
			return k, "", nil
		}
		fresh = why
		if err := Discard(cfg.Pin); err != nil {
			return nil, "", err
		}
	}
	k, err := load(cache, cfg.Pin, mount, slots, have)
	if err != nil {
		return nil, "", err
	}
	// Last: without it nobody takes it up.
	copy(k.control[ctlIdentity:ctlIdentity+sha256.Size], identity[:])
	return k, fresh, nil
}

func identityOf(key string, mount mountID, slots uint64, have []hook) [sha256.Size]byte {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q %+v %d %+v", objectHash(), key, mount, slots, have)
	return [sha256.Size]byte(h.Sum(nil))
}

// takeUp returns nil and why, if what is pinned is not what is wanted.
func takeUp(pin string, identity [sha256.Size]byte, slots uint64, have []hook) (*kernel, string) {
	if _, err := os.Lstat(pin); errors.Is(err, fs.ErrNotExist) {
		return nil, "tracking began"
	}
	k := newKernel(slots)
	ok := false
	defer func() {
		if !ok {
			_ = k.close()
		}
	}()
	for _, name := range []string{"control", "ring", "places"} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(pin, mapPrefix+name), nil)
		if err != nil {
			return nil, "what was tracked before is damaged: " + err.Error()
		}
		k.maps[name] = m
	}
	if m := k.maps["control"]; m.ValueSize() != ctlSize || m.Flags()&unix.BPF_F_MMAPABLE == 0 {
		return nil, "another version tracked before"
	}
	if err := k.mapMemory(); err != nil {
		return nil, err.Error()
	}
	if [sha256.Size]byte(k.control[ctlIdentity:ctlIdentity+sha256.Size]) != identity {
		return nil, "another volume, mount, boot or version was tracked before"
	}
	for _, h := range have {
		l, err := link.LoadPinnedLink(filepath.Join(pin, linkPrefix+h.program), nil)
		if err != nil {
			return nil, "what was tracked before is damaged: " + err.Error()
		}
		k.links[h.program] = l
	}
	for _, name := range programNames(have) {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(pin, progPrefix+name), nil)
		if err != nil {
			return nil, "what was tracked before is damaged: " + err.Error()
		}
		k.progs[name] = p
	}
	if k.get(ctlForgot) != 0 {
		return nil, "the agent ended with more changes in hand than are kept"
	}
	k.next, k.epoch = k.get(ctlHead), k.get(ctlSettled)
	ok = true
	return k, ""
}

func newKernel(slots uint64) *kernel {
	return &kernel{slots: slots, maps: map[string]*ebpf.Map{}, progs: map[string]*ebpf.Program{}, links: map[string]link.Link{}}
}

func programNames(have []hook) []string {
	names := []string{"flip", "in_flight"}
	for _, h := range have {
		names = append(names, h.program)
	}
	return names
}

func load(cache *btf.Cache, pin string, mount mountID, slots uint64, have []hook) (*kernel, error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, loadError(err)
	}
	spec, err := loadObject()
	if err != nil {
		return nil, err
	}
	wanted := map[string]bool{}
	for _, name := range programNames(have) {
		wanted[name] = true
	}
	for name := range spec.Programs {
		if !wanted[name] {
			delete(spec.Programs, name)
		}
	}
	spec.Maps["ring"].MaxEntries = uint32(slots)
	spec.Maps["places"].MaxEntries = uint32(slots)
	for name, value := range map[string]uint32{
		"device":     unix.Major(mount.dev)<<20 | unix.Minor(mount.dev),
		"ring_slots": uint32(slots),
		"page_shift": uint32(bits.TrailingZeros(uint(os.Getpagesize()))),
		// Where nothing tells when direct writes to ext4 arrive, it is asked.
		"ask_direct": asksDirect(mount.fsType, have),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s of the tracking programs: %w", name, err)
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{}, Cache: cache})
	if err != nil {
		return nil, loadError(err)
	}
	defer coll.Close()
	k := newKernel(slots)
	ok := false
	defer func() {
		if !ok {
			_ = k.close()
			_ = Discard(pin)
		}
	}()
	for _, name := range []string{"control", "ring", "places"} {
		k.maps[name] = coll.DetachMap(name)
	}
	for _, name := range programNames(have) {
		k.progs[name] = coll.DetachProgram(name)
	}
	if err := k.mapMemory(); err != nil {
		return nil, err
	}
	k.put(ctlEpoch, 1) // slots that were never used are of epoch 0
	for _, h := range have {
		l, err := link.AttachTracing(link.TracingOptions{Program: k.progs[h.program]})
		if err != nil {
			return nil, loadError(fmt.Errorf("attach to %s: %w", h.point, err))
		}
		k.links[h.program] = l
	}
	if pin != "" {
		if err := k.pin(pin); err != nil {
			return nil, err
		}
	}
	ok = true
	return k, nil
}

// asksDirect is 1 if iomap_iter has to record direct writes when they begin.
func asksDirect(fsType string, have []hook) uint32 {
	if fsType == xfs {
		return 0
	}
	for _, h := range have {
		if h.point == "iomap_dio_complete" {
			return 0
		}
	}
	return 1
}

func loadError(err error) error {
	if errors.Is(err, unix.EPERM) { // not EACCES, with which the verifier answers
		if lockedDown() {
			return fmt.Errorf("%w: the kernel is locked down (confidentiality), which forbids reading its structures: %w", ErrUnsupported, err)
		}
		return fmt.Errorf("%w: loading programs into the kernel is not permitted; run as root, or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN, outside of an unprivileged container: %w", ErrUnsupported, err)
	}
	return fmt.Errorf("%w: load the tracking programs: %w", ErrUnsupported, err)
}

func lockedDown() bool {
	b, err := os.ReadFile("/sys/kernel/security/lockdown")
	return err == nil && strings.Contains(string(b), "[confidentiality]")
}

func (k *kernel) pin(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create the directory for pinned programs: %w", err)
	}
	for name, m := range k.maps {
		if err := m.Pin(filepath.Join(dir, mapPrefix+name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	for name, p := range k.progs {
		if err := p.Pin(filepath.Join(dir, progPrefix+name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	for name, l := range k.links {
		if err := l.Pin(filepath.Join(dir, linkPrefix+name)); err != nil {
			return fmt.Errorf("pin link %s: %w", name, err)
		}
	}
	return nil
}

// Discard ends the collecting that is pinned in a directory, if any, without a Tracker.
func Discard(pin string) error {
	if pin == "" {
		return nil
	}
	if err := os.RemoveAll(pin); err != nil {
		return fmt.Errorf("remove pinned programs: %w", err)
	}
	return nil
}

func (k *kernel) mapMemory() error {
	for _, m := range []struct {
		name string
		size int
		to   *[]byte
	}{{"control", ctlSize, &k.control}, {"ring", int(k.slots) * slotSize, &k.ring}} {
		size := (m.size + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1)
		b, err := unix.Mmap(k.maps[m.name].FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("map the memory of %s: %w", m.name, err)
		}
		*m.to = b
	}
	return nil
}

func (k *kernel) close() error {
	var errs []error
	for _, b := range [][]byte{k.control, k.ring} {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	for _, l := range k.links {
		errs = append(errs, l.Close())
	}
	for _, p := range k.progs {
		errs = append(errs, p.Close())
	}
	for _, m := range k.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

func (k *kernel) loaded() int { return len(k.links) }

func (k *kernel) get(offset int) uint64    { return binary.NativeEndian.Uint64(k.control[offset:]) }
func (k *kernel) put(offset int, n uint64) { binary.NativeEndian.PutUint64(k.control[offset:], n) }

// drain returns what was recorded since the last call.
func (k *kernel) drain() (files, string, error) {
	start := k.next
	// Slots from here on may belong to the next epoch.
	tail := k.get(ctlTail)
	// A system call, and with it a barrier: programs that it does not find busy see the new
	// epoch.
	ended, err := k.progs["flip"].Run(&ebpf.RunOptions{})
	if err != nil {
		return nil, "", fmt.Errorf("begin a new epoch: %w", err)
	}
	if err := k.quiesce(); err != nil {
		return nil, "", err
	}
	end := min(k.get(ctlTail), start+k.slots)
	fs := files{}
	for n := start; n < end; n++ {
		k.read(n&(k.slots-1), uint32(k.epoch), ended, fs)
	}
	k.next, k.epoch = min(tail, end), uint64(ended)

	var lost string
	if now := k.get(ctlLost); now != k.get(ctlLostSeen) {
		lost = fmt.Sprintf("more than %d MiB of files were touched at once", k.slots)
		k.put(ctlLostSeen, now)
		k.next = tail
	}
	if missed, err := k.missed(); err != nil {
		return nil, "", err
	} else if missed != k.get(ctlMissSeen) {
		lost = first(lost, "the kernel left out tracking programs that interrupted themselves")
		k.put(ctlMissSeen, missed)
	}
	if lost != "" || k.next-k.get(ctlHead) > k.slots/2 {
		if lost == "" {
			k.put(ctlForgot, 1)
		}
		k.release()
	}
	return fs, lost, nil
}

// release gives the slots that have been drained back.
func (k *kernel) release() {
	k.put(ctlSettled, k.epoch)
	k.put(ctlHead, k.next)
}

// settle is called when everything drained so far is safe elsewhere, but for what carried
// says the Tracker still has in hand.
func (k *kernel) settle(carried bool) {
	k.release()
	var forgot uint64
	if carried {
		forgot = 1
	}
	k.put(ctlForgot, forgot)
}

// quiesce waits for the programs that run, which takes less than a microsecond each.
func (k *kernel) quiesce() error {
	for cpu := range cpus {
		for tries := 0; k.get(ctlBusy+cpu*64) != 0; tries++ {
			if tries > 10_000_000 {
				return errors.New("wait for tracking programs: one does not end; remove what is pinned and start again")
			}
			runtime.Gosched()
		}
	}
	return nil
}

// missed counts the runs that the kernel left out because the same program was running on
// the processor already, interrupted.
func (k *kernel) missed() (uint64, error) {
	var sum uint64
	var pair []uint64
	for name := range k.links {
		s, err := k.progs[name].Stats()
		if err != nil {
			return 0, fmt.Errorf("ask for missed runs: %w", err)
		}
		if strings.HasPrefix(name, "dio_complete") {
			pair = append(pair, s.RecursionMisses)
			continue
		}
		sum += s.RecursionMisses
	}
	// Two programs do the same work, so that each does what the other misses.
	if len(pair) == 2 {
		sum += min(pair[0], pair[1])
	}
	return sum, nil
}

// read adds the slot at index if it is of an epoch after and not beyond last.
func (k *kernel) read(index uint64, after, last uint32, to files) {
	s := k.ring[index*slotSize : (index+1)*slotSize]
	epoch := binary.NativeEndian.Uint32(s[12:])
	if epoch <= after || epoch > last {
		return
	}
	f := to.file(binary.NativeEndian.Uint64(s))
	var words [5]uint64
	for i := range words {
		words[i] = binary.NativeEndian.Uint64(s[16+8*i:])
	}
	if n := binary.NativeEndian.Uint32(s[8:]); n == wholeFile {
		f.flags |= words[0]
		if words[4] != 0 {
			f.addr = words[4]
		}
	} else {
		f.chunks = append(f.chunks, chunk{n, bitmap{words[0], words[1]}, bitmap{words[2], words[3]}})
	}
}
