/*
 * lease.pml: the lease above the register, and the guard, in time.
 *
 * The register is one record with an atomic compare-and-swap that may also take effect long
 * after its sender gave up waiting, or never (register.pml shows that the file backend is
 * that). Time passes in ticks, at any moment, as many as it likes; every instance counts
 * the same ticks but compares nothing with another's clock. An agent sleeps between any two
 * steps for any time; a whole host may be suspended. The guard and the kernel's timer are
 * not agents: they act LATENCY ticks after the deadline at the latest.
 *
 * Versions have no numbers: a base that is no longer the newest never will be again, so one
 * bit per reader says all. So renewals go on for ever in a finite model.
 *
 * What may be switched off:
 *   NO_TTL_WAIT          a challenger acquires as soon as it likes
 *   NO_WATCHED_VERSION   it waits for the TTL, then swaps whatever version it finds then
 *   NO_TTL_IN_VERSION    it waits for its own configured TTL, not for the record's
 *   NO_SEND_STAMP        validity counts from the reply, not from before sending
 *   NO_GUARD             only the agent itself looks at the deadline
 *   NO_MARGIN            the deadline leaves no time for killing
 *   NO_FRESH_NONCE       an old attempt's record is taken for that of the newest attempt
 *   NO_UNKNOWN           a renewal without an answer counts as done
 *   NO_BOOTTIME          clocks stop while the host is suspended
 * With SUSPEND, instance 0's host may be suspended. With SHOW, the model must reach a
 * state that shows that it is not empty.
 */
#ifndef N
#define N       2
#endif
#define NOBODY  N
#define LATENCY 1
#ifdef NO_MARGIN
#define MARGIN  0
#else
#define MARGIN  1
#endif
/* Configured TTLs differ: the file is being changed from machine to machine. */
#define TTLOF(p) (3 - ((p) & 1))

hidden byte one_writer, shown;

byte hold = NOBODY;      /* the record: its holder */
byte rttl = 2;           /*             the TTL in it */
byte rmine = NOBODY;     /*             whose present attempt wrote it */
byte lh[N];              /* holder in the version that the instance has loaded */
byte lttl[N];            /* TTL in it */
bit  fresh[N];           /* that version is still the newest */
byte watched[N];         /* ticks since it was first seen */
byte val[N];             /* what is left of the present attempt's validity */
byte left[N];            /* ticks until the database is certainly dead */
bit  db[N];              /* the database takes writes */
bit  flight[N];          /* a swap that nobody waits for is on its way; its base is the newest */
bit  fpres[N];           /*   it is the present attempt */
#ifdef SUSPEND
bit  susp[N];
#define AWAKE(p) (!susp[p])
#else
#define AWAKE(p) true
#endif

#if defined(NO_TTL_WAIT)
#define WAITED(p) true
#elif defined(NO_TTL_IN_VERSION)
#define WAITED(p) (watched[p] >= TTLOF(p))
#define COUNT(p)  3
#else
#define WAITED(p) (watched[p] >= lttl[p])
#endif
#ifndef COUNT
#define COUNT(p)  lttl[p]      /* no need to count further */
#endif
#ifdef NO_WATCHED_VERSION
#define REREAD(p) fresh[p] = 1
#else
#define REREAD(p) i = 0
#endif

#ifdef SHOW
/* One database after the other's, and the first one did not renew for ever. */
bit had[N];
#define SHOWN(p) had[p] = 1; assert(!(had[0] && had[1] && flight[0]) || shown)
#else
#define SHOWN(p) i = 0
#endif

hidden byte i, j;        /* only inside d_step */

/* A swap whose base is no longer the newest has no effect and is forgotten. So is the
   validity of an attempt that nothing can prove any more. */
inline stale(q) {
	flight[q] = 0;
	if :: fpres[q] || rmine == q -> val[q] = 0 :: else fi;
	fpres[q] = 0
}

/* The record changes to one that p wrote. */
inline effect(p, present) {
	i = 0;
	do
	:: i < N -> fresh[i] = 0; watched[i] = 0; stale(i); i++
	:: else -> break
	od;
	i = 0;
	hold = p;
	rttl = TTLOF(p);
	if :: present -> rmine = p :: else -> rmine = NOBODY fi
}

inline stamp(p) {
	val[p] = TTLOF(p) - MARGIN;
#ifndef NO_FRESH_NONCE
	fpres[p] = 0;
	if :: rmine == p -> rmine = NOBODY :: else fi
#endif
}

/* Validity is proved: the guard gets the new deadline first. */
inline extend(p) {
	if
	:: val[p] > 0 && val[p] + LATENCY > left[p] -> left[p] = val[p] + LATENCY
	:: else
	fi
}

inline checkWriters() {
	i = 0; j = 0;
	do
	:: i < N -> if :: db[i] && AWAKE(i) -> j++ :: else fi; i++
	:: else -> break
	od;
	assert(j <= 1 || one_writer);
	i = 0; j = 0
}

inline fence() {
	i = 0;
	do
	:: i < N ->
#ifndef NO_GUARD
		if :: left[i] == 0 && AWAKE(i) -> db[i] = 0 :: else fi;
#endif
		i++
	:: else -> break
	od;
	i = 0
}

proctype Clock() {
end:	do
	:: d_step {
		true;
		i = 0;
		do
		:: i < N ->
#ifdef NO_BOOTTIME
			if :: AWAKE(i) ->
#endif
			if :: val[i] > 0 -> val[i]-- :: else fi;
			if :: left[i] > 0 -> left[i]-- :: else fi;
			if :: fresh[i] && watched[i] < COUNT(i) && lh[i] != i -> watched[i]++ :: else fi;
#ifdef NO_BOOTTIME
			:: else fi;
#endif
			i++
		:: else -> break
		od;
		fence()
	}
#ifdef SUSPEND
	:: d_step { !susp[0] -> susp[0] = 1 }
	:: d_step { susp[0] -> susp[0] = 0; fence(); checkWriters() }
#endif
	od
}

proctype Flight(byte p) {
	bit pres;
	byte v;

end:	do
	:: d_step { flight[p] -> pres = fpres[p]; v = val[p]; effect(p, pres); if :: pres -> val[p] = v :: else fi; pres = 0; v = 0 }
	:: d_step { flight[p] -> stale(p) }
	od
}

proctype Agent(byte p) provided (AWAKE(p)) {
Idle:	do
	:: d_step {                                      /* load */
		true;
		lh[p] = hold; lttl[p] = rttl;
		if :: !fresh[p] -> watched[p] = 0; fresh[p] = 1 :: else fi;
		if :: rmine == p -> extend(p); val[p] = 0; rmine = NOBODY :: else fi
	}
	:: d_step { left[p] <= LATENCY && db[p] -> db[p] = 0 }      /* the agent's own watchdog */
	:: d_step { left[p] > LATENCY && !db[p] && lh[p] == p -> db[p] = 1; checkWriters(); SHOWN(p) }
	:: d_step { lh[p] == p -> stamp(p) }; goto Swap             /* renew */
	:: d_step { lh[p] != p && WAITED(p) -> stamp(p); REREAD(p) }; goto Swap  /* acquire */
	od;
Swap:	if
	:: d_step { fresh[p] -> effect(p, 0); fresh[p] = 1; lh[p] = p; lttl[p] = rttl; watched[p] = 0; rmine = NOBODY }; goto Done
	:: d_step { !fresh[p] -> skip }; goto Lost
	:: d_step { fresh[p] && !flight[p] -> flight[p] = 1; fpres[p] = 1 };
#ifdef NO_UNKNOWN
		goto Done
#else
		goto Idle
#endif
#ifdef NO_FRESH_NONCE
	:: goto Idle
#else
	:: goto Lost                                                /* never arrived */
#endif
	fi;
Lost:	atomic { val[p] = 0; goto Idle };
Done:	/* The reply may be slow. */
	atomic {
#ifdef NO_SEND_STAMP
		stamp(p);
#endif
		extend(p); val[p] = 0; goto Idle
	}
}

init {
	atomic {
		i = 0;
		do
		:: i < N -> lh[i] = NOBODY; i++
		:: else -> break
		od;
		run Clock();
		i = 0;
		do
		:: i < N -> run Flight(i); run Agent(i); i++
		:: else -> break
		od;
		i = 0
	}
}
