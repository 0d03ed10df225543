/*
 * handoff.pml: planned handoffs, restarts, volumes and what they hold.
 *
 * Two or three instances. A database acknowledges writes, each write is one bit; a volume is the set
 * of writes that it holds, once as the database sees it and once as a crash of the host
 * would leave it. Agents start the database, commit snapshots, hand off, crash alone
 * (the database runs on) or with their host, at any step. A swap may take effect after its
 * sender gave up or crashed, or never; an agent that was replaced on its host may still be
 * there and try its last swap. The TTL is taken from lease.pml: a term that was not
 * released is taken over only when its holder's deadline is over, and then its database is
 * dead.
 *
 * A swap succeeds only if nothing changed since its load. So load and swap are one step
 * here, except where something is computed in between: then the basis is checked. Sleeping
 * between them would only make it fail.
 *
 * What may be switched off:
 *   NO_RELEASE_GIVES_UP  a database starts again after a release was sent, without a later own swap
 *   NO_INCARNATION_SWAP  a restarted agent goes on without swapping its incarnation in
 *   NO_CHECK_INC         a swap is retried on a newer version although the incarnation changed
 *   NO_SYNC_FIRST        the local volume is not synced before the commit
 *   NO_STOP_FIRST        the last snapshot is taken before the database has stopped
 *   NO_COMMIT_FIRST      the term is released although the last commit's outcome is unknown
 *   NO_FORK              a volume is used although somebody else has held the term since
 * With SHOW, the model must reach a state that shows that it is not empty.
 */
#ifndef W
#define W 3              /* writes */
#endif
#ifndef N
#define N 2              /* instances: 2 or 3 */
#endif
#define ANYBODY N

#ifdef NO_FORK
#define UNFIT(q) skip
#else
#define UNFIT(q) fit[q] = 0; vol[q] = 0; disk[q] = 0
#endif

hidden byte one_writer, handoff_kept, holder, release, head, fork_stays_out, head_on_disk, shown;
hidden byte i;           /* only inside d_step */

byte hold;               /* the record: holder of the term, or who held it last */
bit  rel = 1;            /*             released, */
byte succ = ANYBODY;     /*             to whom */
byte hc;                 /*             what the head contains */
byte nextw;              /* writes so far */
byte acked;              /* ghost: acknowledged in this term */
byte lost;               /* ghost: acknowledged in an earlier term and not in its successor's head */

byte vol[N], disk[N];    /* the volume; what of it survives the host's crash */
bit  fit[N];             /* nobody else has held the term since the volume was last in step */
bit  db[N];              /* the database takes writes */
bit  dl[N];              /* the deadline is not over */
bit  ok[N];              /* this incarnation knows, by a swap of its own, that it may run the database */
bit  inrec[N];           /* the record, if it names this instance, names this incarnation */
bit  file[N];            /* the file in /run, which a reboot removes; useless after the deadline */
bit  same[N];            /* the basis, that is term, incarnation and head, is still as loaded */

#define MAY_ACQUIRE(p) ((hold != p || !inrec[p] || rel) && ((rel && (succ == p || succ == ANYBODY)) || !dl[hold]))

#define RENEW   1
#define ACQUIRE 2
#define COMMIT  3
#define RELEASE 4
byte fkind, fsnap, fby;              /* a swap that nobody waits for; gone when the version moves */
byte okind, osnap, oby;  /* the last swap of an agent that has been replaced */

#define ALL(x) i = 0; do :: i < N -> x; i++ :: else -> break od; i = 0

inline moved() { fkind = 0; fsnap = 0; fby = 0 }

inline dropOld() { okind = 0; osnap = 0; oby = 0 }

inline doRenew(p) {
	moved();
#ifndef NO_CHECK_INC
	if :: !inrec[p] -> dropOld() :: else fi
#else
	skip
#endif
}

inline doAcquire(p) {
	assert(!rel || (acked & ~hc) == 0 || handoff_kept);
#ifdef SHOW
	/* After an unplanned loss of a write, a handoff of one that was kept. */
	assert(!(rel && succ == p && lost != 0 && hc != 0 && hold != p && dl[hold]) || shown);
#endif
	if
	:: hold == p && fit[p] -> lost = lost | (acked & ~hc & ~vol[p])
	:: else -> lost = lost | (acked & ~hc)
	fi;
	acked = acked & ~hc & ~lost;
	ALL(if :: i != p -> UNFIT(i); inrec[i] = 0 :: else fi; same[i] = 0);
	hold = p; rel = 0; succ = ANYBODY;
	moved(); dropOld()
}

inline doCommit(p, snap) {
	assert(hold == p || holder);
	assert(!rel || release);
	assert((hc & ~snap) == 0 || head);
	assert((snap & lost) == 0 || fork_stays_out);
	hc = snap;
	moved(); dropOld();
	ALL(same[i] = 0)
}

inline doRelease(p, to) {
	assert(hold == p || holder);
	assert(!rel || release);
	rel = 1; succ = to;
	moved()
}

proctype World() {
	byte q, s;
end:	do
	/* a deadline, and the guard; a write */
	:: atomic { true;
		if
		:: q = 0
		:: q = 1
#if N > 2
		:: q = 2
#endif
		fi;
		if
		:: dl[q] -> dl[q] = 0; db[q] = 0; file[q] = 0
		:: db[q] && nextw < W -> vol[q] = vol[q] | (1 << nextw); acked = acked | (1 << nextw); nextw++
		:: else
		fi;
		q = 0 }
	:: d_step { fkind != 0 -> q = fby; s = fsnap;
		if
		:: fkind == RENEW   -> doRenew(q)
		:: fkind == ACQUIRE -> doAcquire(q); inrec[q] = 1
		:: fkind == COMMIT  -> doCommit(q, s)
		:: fkind == RELEASE -> doRelease(q, s)
		fi;
		q = 0; s = 0 }
	:: d_step { fkind != 0 -> fkind = 0; fsnap = 0; fby = 0 }
	/* The replaced agent. Whatever would really change its basis drops it. */
	:: d_step { okind != 0 -> q = oby; s = osnap;
		if
		:: okind == COMMIT  -> doCommit(q, s)
		:: okind == RELEASE -> doRelease(q, s)
		fi;
		dropOld(); q = 0; s = 0 }
	:: d_step { okind != 0 -> dropOld() }
	od
}

proctype Agent(byte p) {
	byte snap;                   /* what the snapshot holds; then the successor's name */
	bit planned;

Run:	atomic { snap = 0; planned = 0; same[p] = 0 };
end:	if
	/* renew; or, after a restart on the same boot and in time, put the new incarnation in */
	:: d_step { hold == p && !rel && (inrec[p] || file[p]) ->
		doRenew(p); inrec[p] = 1; dl[p] = 1; ok[p] = 1; file[p] = 1 }; goto Run
	:: atomic { hold == p && !rel && (inrec[p] || file[p]) && fkind == 0 -> fkind = RENEW; fby = p; goto Run }
#ifdef NO_INCARNATION_SWAP
	:: atomic { hold == p && !rel && file[p] && !inrec[p] -> inrec[p] = 1; ok[p] = 1; goto Run }
#endif
	/* acquire: the named successor at once, everybody else after the TTL; a container of
	   another term is killed first */
	:: atomic { MAY_ACQUIRE(p) && db[p] -> db[p] = 0; goto Run }
	:: d_step { MAY_ACQUIRE(p) && !db[p] -> doAcquire(p); inrec[p] = 1; dl[p] = 1; ok[p] = 1; file[p] = 1 }; goto Run
	:: atomic { MAY_ACQUIRE(p) && !db[p] && fkind == 0 -> fkind = ACQUIRE; fby = p; goto Run }
	/* before it writes, the volume is brought to head, and what it had beyond is a fork */
	:: d_step { hold == p && !rel && inrec[p] && ok[p] && !fit[p] && !db[p] -> vol[p] = hc; disk[p] = hc; fit[p] = 1 }; goto Run
	:: d_step { ok[p] && dl[p] && fit[p] && !db[p] ->
		ALL(assert(i == p || !db[i] || one_writer));
		assert((hc & ~vol[p]) == 0 || head_on_disk);
		assert((vol[p] & lost) == 0 || fork_stays_out);
		db[p] = 1 }; goto Run
	/* commit; or hand off */
	:: atomic { hold == p && !rel && inrec[p] && ok[p] && fit[p] -> same[p] = 1; goto Capture }
	:: atomic { hold == p && !rel && inrec[p] && ok[p] && fit[p] -> same[p] = 1; planned = 1; goto Stop }
	:: goto Crash
	fi;

Stop:
#ifndef NO_STOP_FIRST
	atomic { db[p] = 0 };
#endif
Capture: atomic { snap = vol[p] };
#ifdef NO_STOP_FIRST
	if
	:: planned -> db[p] = 0
	:: else
	fi;
#endif
#ifndef NO_SYNC_FIRST
	if
	:: atomic { disk[p] = vol[p] }
	:: goto Crash
	fi;
#endif
Commit:	if
	:: d_step { same[p] -> doCommit(p, snap); dl[p] = 1; file[p] = 1; same[p] = 1 };
		if :: planned -> goto Release :: !planned -> goto Run fi
	:: !same[p] -> goto Run
	:: atomic { same[p] && fkind == 0 -> fkind = COMMIT; fsnap = snap; fby = p;
#ifdef NO_COMMIT_FIRST
		if :: planned -> goto Release :: !planned -> goto Run fi
#else
		goto Run
#endif
		}
	:: goto Run
	:: atomic { okind == 0 && same[p] -> okind = COMMIT; osnap = snap; oby = p; goto Crash }
	:: goto Crash
	fi;

Release: /* From now on the term counts as not held, whatever comes of it. */
	atomic {
#ifndef NO_RELEASE_GIVES_UP
		ok[p] = 0;
#endif
		if
		:: snap = (p + 1) % N
#if N > 2
		:: snap = (p + 2) % N
#endif
		fi };
Send:	if
	:: d_step { same[p] -> doRelease(p, snap) }; goto Run
	:: !same[p] -> goto Run
	:: atomic { same[p] && fkind == 0 -> fkind = RELEASE; fsnap = snap; fby = p; goto Run }
	:: goto Run
	:: atomic { okind == 0 && same[p] -> okind = RELEASE; osnap = snap; oby = p; goto Crash }
	:: goto Crash
	fi;

Crash:	atomic {
		ok[p] = 0; inrec[p] = 0;
		if
		:: skip                                           /* the agent alone */
		:: file[p] = 0; db[p] = 0; vol[p] = disk[p];       /* the host */
			if
			:: okind != 0 && oby == p -> okind = 0; osnap = 0; oby = 0
			:: else
			fi
		fi;
		goto Run
	}
}

init {
	atomic {
		run World(); run Agent(0); run Agent(1)
#if N > 2
		; run Agent(2)
#endif
	}
}
