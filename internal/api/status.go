// Package api is what the agent tells and what it can be asked for: the status that
// people and programs read, the interface that the supervisor implements, the root-only
// unix socket between command line and agent, and the read-only HTTP endpoints for load
// balancers and Prometheus.
package api

import "time"

// Role says in one word what this instance is for the cluster right now.
type Role string

// The roles of an instance.
const (
	RolePrimary  Role = "primary"  // holds a live term and its database accepts writes
	RoleStandby  Role = "standby"  // follows head, ready to take over
	RoleStarting Role = "starting" // holds the term; the database does not answer yet
	RoleHandoff  Role = "handoff"  // is giving the term up in a planned move
	RoleFenced   Role = "fenced"   // lost the term; the database is being or has been killed
	RoleDown     Role = "down"     // no agent, or one that can do nothing
)

// Status is everything that is known about this instance and its cluster at one moment.
// Its JSON is stable: fields may be added, not renamed. Pointers are null when unknown or
// when the field has no meaning in this role.
type Status struct {
	Role Role `json:"role"`
	// State is the supervisor's own name of what it is doing ("acquiring", "hydrating");
	// finer than Role, for people and logs.
	State string `json:"state"`
	// Degraded lists in plain words why the role's duty is not wholly fulfilled (snapshots
	// fail, lease can't be renewed, local copy can't be updated). Empty means all is well.
	Degraded []string `json:"degraded,omitempty"`
	// Source is "agent", or "register" when no agent ran and the register was read.
	Source string `json:"source"`
	// At is the time of day at which this was put together.
	At time.Time `json:"at"`
	// Version is the agent's program version.
	Version string `json:"version,omitempty"`

	Cluster     string `json:"cluster"`
	ClusterID   string `json:"cluster_id,omitempty"`
	Instance    string `json:"instance"`
	Incarnation string `json:"incarnation,omitempty"`
	Zone        string `json:"zone,omitempty"`

	Term      uint64  `json:"term"`
	Primary   Primary `json:"primary"` // who holds (if Released: last held) the term
	Released  bool    `json:"released"`
	Successor string  `json:"successor,omitempty"`
	Paused    bool    `json:"paused"`

	Failover Failover `json:"failover,omitzero"`

	Lease Lease `json:"lease"`
	Head  *Head `json:"head"`
	// HeadComplete says that head holds everything that was ever acknowledged: nobody has
	// held the term since it was made, or it was handed over in a planned way.
	HeadComplete bool        `json:"head_complete"`
	LastCommit   *LastCommit `json:"last_commit"`
	// LossWindowSeconds is how many seconds of writes would be lost if this primary were
	// lost now: the time since the freeze of the last committed snapshot, or since the
	// last look that found the volume unchanged. Null when not primary or unknown.
	LossWindowSeconds *float64 `json:"loss_window_seconds"`

	Local     Local     `json:"local"`
	Database  Database  `json:"database"`
	Replica   *Replica  `json:"replica,omitempty"` // null where no reads are served
	Sync      Sync      `json:"sync"`
	Upkeep    Upkeep    `json:"upkeep"`
	Forks     []Fork    `json:"forks"`
	LastError *Problem  `json:"last_error"`
	Gate      Gate      `json:"gate"`
	Guard     Guard     `json:"guard"`
	Progress  *Progress `json:"progress"`
	// History is the newest few entries, newest last.
	History []Event `json:"history"`
}

// Failover says whether and how this instance takes part in failovers.
type Failover struct {
	Priority int  `json:"priority"`
	Never    bool `json:"never"` // this instance never becomes primary
	// LastHour counts the cluster's failovers of the last hour that no person asked for. With
	// MaxPerHour of them the next one takes a person.
	LastHour   int `json:"last_hour"`
	MaxPerHour int `json:"max_per_hour"`
	// AsksForPerson: the primary is silent and its lease is over, but nobody takes over by
	// itself because there were too many failovers.
	AsksForPerson bool `json:"asks_for_person"`
}

// Primary says who holds the term and where its database is.
type Primary struct {
	Instance string `json:"instance"`
	Address  string `json:"address,omitempty"` // host:port for writers
	HTTP     string `json:"http,omitempty"`    // host:port of its agent's endpoints
	Zone     string `json:"zone,omitempty"`
	Self     bool   `json:"self"` // it is this instance
}

// Lease is this instance's view of the lease.
type Lease struct {
	// Holding says that this instance's term is valid at this moment.
	Holding bool `json:"holding"`
	// DeadlineInMS is the time until this instance must have stopped writing; null when
	// it does not hold the lease.
	DeadlineInMS *int64 `json:"deadline_in_ms"`
	// ChallengeInMS is the time until this instance may try to acquire; null when it holds.
	ChallengeInMS *int64 `json:"challenge_in_ms,omitempty"`
	TTLMS         int64  `json:"ttl_ms"`
	Version       uint64 `json:"version"` // of the register's newest known record
	// LastContactMS is how long ago the register was last reached; null: not yet.
	LastContactMS *int64 `json:"last_contact_ms"`
	Error         string `json:"error,omitempty"`
}

// Head is the newest committed snapshot of the cluster.
type Head struct {
	ID         string    `json:"id"`
	Seq        uint64    `json:"seq"`
	Term       uint64    `json:"term"`
	Frozen     time.Time `json:"frozen"`
	AgeSeconds float64   `json:"age_seconds"` // by this instance's time of day
}

// LastCommit is the last snapshot that this incarnation committed.
type LastCommit struct {
	ID           string    `json:"id"`
	At           time.Time `json:"at"`
	FreezeMS     float64   `json:"freeze_ms"`
	ChangedBytes int64     `json:"changed_bytes"` // of the volume, uncompressed
	StoredBytes  int64     `json:"stored_bytes"`  // written to the share
	DurationMS   float64   `json:"duration_ms"`   // from the first look to the commit
	Capture      Capture   `json:"capture,omitzero"`
}

// Local is this instance's copy of the volume.
type Local struct {
	VolumeID        string `json:"volume_id,omitempty"`
	Phase           string `json:"phase"` // empty, applying, clean, live
	Base            string `json:"base"`  // ID of the snapshot that it descends from
	BehindSnapshots int64  `json:"behind_snapshots"`
	BehindBytes     int64  `json:"behind_bytes"` // 0 when not known
	// Refreshed is how this incarnation last brought the copy to another snapshot: in a "clone",
	// with "two copies" that take turns, or "in place", where it can't be used meanwhile.
	// RefreshReason is why it was in place.
	Refreshed     string `json:"refreshed,omitempty"`
	RefreshReason string `json:"refresh_reason,omitempty"`
	// FreeBytes is the room left on the local disk; null when not known.
	FreeBytes *int64 `json:"free_bytes,omitempty"`
}

// Database is the container and whether it answers.
type Database struct {
	Container string     `json:"container,omitempty"` // name
	Image     string     `json:"image,omitempty"`
	Running   bool       `json:"running"`
	Healthy   bool       `json:"healthy"` // the last probe was answered
	LastProbe *time.Time `json:"last_probe"`
	Error     string     `json:"error,omitempty"`
	Restarts  int        `json:"restarts"` // deaths in this term that were answered by a restart
}

// Sync is the state of the snapshot schedule.
type Sync struct {
	Schedule            string     `json:"schedule"`
	Next                *time.Time `json:"next"`
	Running             bool       `json:"running"`
	ConsecutiveFailures int        `json:"consecutive_failures"`
	LastError           string     `json:"last_error,omitempty"`
	Tier                string     `json:"tier,omitempty"`        // how change is found: "tracked" or "hashed"
	TierReason          string     `json:"tier_reason,omitempty"` // why it is not the better tier
	Tracking            Tracking   `json:"tracking,omitzero"`
	Commits             int64      `json:"commits"`  // of this incarnation
	Failures            int64      `json:"failures"` // of this incarnation
	// IntervalSeconds is the time between two snapshots that is kept now; Slowed says that it
	// is longer than Schedule asks for, because snapshots take so long.
	IntervalSeconds float64 `json:"interval_seconds"`
	Slowed          bool    `json:"slowed"`
	// FreezeAborts counts captures of this incarnation that were given up because the
	// database would have stood still for longer than sync.max_freeze.
	FreezeAborts int64 `json:"freeze_aborts"`
	// PredictedFreezeMS is how long the next freeze is expected to last; null when not known.
	PredictedFreezeMS *float64 `json:"predicted_freeze_ms,omitempty"`
}

// Upkeep is what is done to keep the store of snapshots small and whole.
type Upkeep struct {
	// CondemnedFiles wait for their grace, or for a reader, to be deleted. Of the holder.
	CondemnedFiles int `json:"condemned_files"`
	// CompactedPacks are packs whose live blocks were brought together in this term.
	CompactedPacks int64 `json:"compacted_packs"`
	// Checking says that this instance is the one that verifies the store now.
	Checking bool `json:"checking"`
	// CheckFiles are the files of the store that this instance knows of, CheckedFiles those
	// of them that it has verified at least once.
	CheckFiles   int `json:"check_files"`
	CheckedFiles int `json:"checked_files"`
	// OldestCheckSeconds is how long the file has waited that waits longest, since it was
	// verified or first seen.
	OldestCheckSeconds float64 `json:"oldest_check_seconds"`
	CheckedBytes       int64   `json:"checked_bytes"` // of this incarnation
	// Damaged are files that verification found damaged or missing, and how.
	Damaged []string `json:"damaged,omitempty"`
}

// Fork is data that was set aside because the cluster's history went on without it.
type Fork struct {
	Name      string    `json:"name"`
	Path      string    `json:"path"`
	Reason    string    `json:"reason"`
	At        time.Time `json:"at"`
	Term      uint64    `json:"term,omitempty"`
	Base      string    `json:"base,omitempty"` // the snapshot that it descends from
	Bytes     int64     `json:"bytes,omitempty"`
	ExpiresAt time.Time `json:"expires_at,omitzero"`
}

// Problem is something that went wrong and what a person can do about it.
type Problem struct {
	What string    `json:"what"`
	Hint string    `json:"hint,omitempty"`
	At   time.Time `json:"at"`
}

// Gate is the kernel's gate in front of the write port.
type Gate struct {
	Open        bool   `json:"open"`
	RemainingMS int64  `json:"remaining_ms"` // until the kernel closes it by itself
	Error       string `json:"error,omitempty"`
}

// Guard is the process that kills the database at the deadline.
type Guard struct {
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
}

// Progress is how far long work has come, in bytes. Total 0 means "not known".
type Progress struct {
	Phase string `json:"phase"`
	Done  int64  `json:"done"`
	Total int64  `json:"total"`
	// Started is when the phase began; zero where nobody keeps it.
	Started time.Time `json:"started,omitzero"`
	// BytesPerSecond is the rate of the last seconds, RemainingSeconds the time that the rest
	// of the phase takes at that rate; null when not known (yet).
	BytesPerSecond   *float64 `json:"bytes_per_second,omitempty"`
	RemainingSeconds *float64 `json:"remaining_seconds,omitempty"`
}

// Event is one entry of the instance's history: one transition.
type Event struct {
	At       time.Time `json:"at"`
	Instance string    `json:"instance,omitempty"`
	Term     uint64    `json:"term"`
	Kind     string    `json:"kind"` // "acquired", "released", "fenced", "committed", …
	From     string    `json:"from,omitempty"`
	To       string    `json:"to,omitempty"`
	Text     string    `json:"text"`
}

// Replica is how reads are served here.
type Replica struct {
	Ports    []int        `json:"ports"`    // the stable read ports
	Serving  *ReplicaCopy `json:"serving"`  // has the read ports; null: nothing does
	Draining *ReplicaCopy `json:"draining"` // the one before, whose sessions go on
	// Phase is what is being done to bring up the next one; "" while nothing is.
	Phase               string `json:"phase,omitempty"`
	Refreshes           int64  `json:"refreshes"` // of this incarnation
	Failures            int64  `json:"failures"`  // of this incarnation
	ConsecutiveFailures int    `json:"consecutive_failures"`
	LastError           string `json:"last_error,omitempty"`
	// RefreshSeconds is how long the last refresh took; Copy how its files were made ("clone" or
	// "two copies"); FetchedBytes what it read of the share beyond what the local copy had.
	RefreshSeconds float64 `json:"refresh_seconds"`
	Copy           string  `json:"copy,omitempty"`
	FetchedBytes   int64   `json:"fetched_bytes"`
	CopiedBytes    int64   `json:"copied_bytes"`
}

// ReplicaCopy is a read-only copy of the database.
type ReplicaCopy struct {
	Container string    `json:"container"`
	Snapshot  string    `json:"snapshot"`
	Term      uint64    `json:"term"`
	Seq       uint64    `json:"seq"`
	Frozen    time.Time `json:"frozen"` // by the primary's time of day
	// AgeSeconds is an upper bound of how old the data are; null: not known yet.
	AgeSeconds *float64 `json:"age_seconds"`
	Healthy    bool     `json:"healthy"`
	Error      string   `json:"error,omitempty"`
	Sessions   int      `json:"sessions"` // connections of readers
}
