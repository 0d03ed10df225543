/*
 * handoff.pml: planned handoffs, restarts, volumes and what they hold.
 *
 * Two instances. A database acknowledges writes, each write is one bit; a volume is the set
 * of writes that it holds, once as the database sees it and once as a crash of the host
 * would leave it. Agents start the database, commit snapshots, hand off, crash alone
 * (the database runs on) or with their host, at any step. A swap may take effect after its
 * sender gave up or crashed, or never; an agent that was replaced on its host may still be
 * there and try its last swap. The TTL is taken from lease.pml: a term that was not
 * released is taken over only when its holder's deadline is over, and then its database is
 * dead.
 *
 * What may be switched off:
 *   NO_RELEASE_GIVES_UP  a database starts again after a release was sent, without a later own swap
 *   NO_INCARNATION_SWAP  a restarted agent goes on without swapping its incarnation in
 *   NO_CHECK_INC         a swap is retried on a newer version although the incarnation changed
 *   NO_SYNC_FIRST        the local volume is not synced before the commit
 *   NO_STOP_FIRST        the last snapshot is taken before the database has stopped
 *   NO_COMMIT_FIRST      the term is released although the last commit's outcome is unknown
 *   NO_FORK              a volume is used although somebody else has held the term since
 */
#ifndef W
#define W 3              /* writes */
#endif
#define OTHER(p) (1 - (p))

#ifdef NO_FORK
#define NOT_FORKED 1
#else
#define NOT_FORKED 0
#endif

hidden byte one_writer, handoff_kept, head, fork_stays_out, head_on_disk;

bit  hold;               /* the record: holder of the term, or who held it last */
bit  rel = 1;            /*             released, */
byte succ = 2;           /*             to whom (2: to anybody) */
byte hc;                 /*             what the head contains */
byte nextw;              /* writes so far */
byte acked;              /* ghost: acknowledged in this term */
byte lost;               /* ghost: acknowledged in an earlier term and not in its successor's head */

byte vol[2], disk[2];    /* the volume; what of it survives the host's crash */
bit  fit[2];             /* nobody else has held the term since the volume was last in step */
bit  db[2];              /* the database takes writes */
bit  dl[2];              /* the deadline is not over */
bit  ok[2];              /* this incarnation knows, by a swap of its own, that it may run the database */
bit  inrec[2];           /* the record, if it names this instance, names this incarnation */
bit  file[2];            /* the file in /run, which a reboot removes */
bit  sameV[2], same[2];  /* the version, and the basis, are still those that were loaded */

#define RENEW   1
#define ACQUIRE 2
#define COMMIT  3
#define RELEASE 4
byte fkind, fsnap; bit fby;          /* a swap that nobody waits for; gone when the version moves */
byte okind, osnap; bit oby, osameV;  /* the last swap of an agent that has been replaced */

inline moved() { sameV[0] = 0; sameV[1] = 0; osameV = 0; fkind = 0; fsnap = 0; fby = 0 }

inline dropOld() { okind = 0; osnap = 0; oby = 0; osameV = 0 }

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
	if
	:: hold == p && fit[p] -> lost = lost | (acked & ~hc & ~vol[p])
	:: else -> lost = lost | (acked & ~hc); fit[OTHER(p)] = NOT_FORKED
	fi;
	acked = acked & ~hc & ~lost;
	hold = p; rel = 0; succ = 2;
	moved(); dropOld();
	same[0] = 0; same[1] = 0;
	inrec[OTHER(p)] = 0
}

inline doCommit(p, snap) {
	assert((hold == p && !rel) || head);
	assert(((hc & ~snap) == 0 && (snap & lost) == 0) || head);
	hc = snap;
	moved(); dropOld();
	same[0] = 0; same[1] = 0
}

inline doRelease(p) {
	assert((hold == p && !rel) || head);
	rel = 1; succ = OTHER(p);
	moved()
}

proctype World() {
	bit q;
	byte s;
end:	do
	:: d_step { dl[0] -> dl[0] = 0; db[0] = 0 }              /* the deadline, and the guard */
	:: d_step { dl[1] -> dl[1] = 0; db[1] = 0 }
	:: d_step { db[0] && nextw < W -> vol[0] = vol[0] | (1 << nextw); acked = acked | (1 << nextw); nextw++ }
	:: d_step { db[1] && nextw < W -> vol[1] = vol[1] | (1 << nextw); acked = acked | (1 << nextw); nextw++ }
	:: d_step { fkind != 0 -> q = fby; s = fsnap;
		if
		:: fkind == RENEW   -> doRenew(q)
		:: fkind == ACQUIRE -> doAcquire(q); inrec[q] = 1
		:: fkind == COMMIT  -> doCommit(q, s)
		:: fkind == RELEASE -> doRelease(q)
		fi;
		q = 0; s = 0 }
	:: d_step { fkind != 0 -> fkind = 0; fsnap = 0; fby = 0 }
	/* The replaced agent. Whatever would really change its basis drops it. */
	:: d_step { okind != 0 && !osameV -> osameV = 1 }
	:: d_step { okind != 0 && osameV -> q = oby; s = osnap;
		if
		:: okind == COMMIT  -> doCommit(q, s)
		:: okind == RELEASE -> doRelease(q)
		fi;
		dropOld(); q = 0; s = 0 }
	:: d_step { okind != 0 -> dropOld() }
	od
}

proctype Agent(bit p) {
	byte snap;
	bit planned;

Run:	atomic { snap = 0; planned = 0; sameV[p] = 0; same[p] = 0 };
end:	if
	/* renew; or, after a restart on the same boot and in time, put the new incarnation in */
	:: atomic { hold == p && !rel && (inrec[p] || (file[p] && dl[p])) -> sameV[p] = 1; goto Renew }
#ifdef NO_INCARNATION_SWAP
	:: atomic { hold == p && !rel && file[p] && dl[p] && !inrec[p] -> inrec[p] = 1; ok[p] = 1; goto Run }
#endif
	/* acquire: the named successor at once, everybody else after the TTL */
	:: atomic { (hold != p || !inrec[p] || rel) && ((rel && (succ == p || succ == 2)) || !dl[hold]) ->
		db[p] = 0; sameV[p] = 1; goto Acquire }
	/* before it writes, the volume is brought to head, and what it had beyond is a fork */
	:: d_step { hold == p && !rel && inrec[p] && ok[p] && !fit[p] && !db[p] -> vol[p] = hc; disk[p] = hc; fit[p] = 1 }; goto Run
	:: d_step { ok[p] && dl[p] && fit[p] && !db[p] ->
		assert(!db[OTHER(p)] || one_writer);
		assert((hc & ~vol[p]) == 0 || head_on_disk);
		assert((vol[p] & lost) == 0 || fork_stays_out);
		db[p] = 1 }; goto Run
	/* commit; or hand off */
	:: atomic { hold == p && !rel && inrec[p] && ok[p] && fit[p] -> sameV[p] = 1; same[p] = 1; goto Capture }
	:: atomic { hold == p && !rel && inrec[p] && ok[p] && fit[p] -> sameV[p] = 1; same[p] = 1; planned = 1; goto Stop }
	:: goto Crash
	fi;

Renew:	if
	:: d_step { sameV[p] -> doRenew(p); inrec[p] = 1; dl[p] = 1; ok[p] = 1; file[p] = 1 }; goto Run
	:: atomic { sameV[p] && fkind == 0 -> fkind = RENEW; fby = p; goto Run }
	:: goto Run
	:: goto Crash
	fi;

Acquire: if
	:: d_step { sameV[p] -> doAcquire(p); inrec[p] = 1; dl[p] = 1; ok[p] = 1; file[p] = 1 }; goto Run
	:: atomic { sameV[p] && fkind == 0 -> fkind = ACQUIRE; fby = p; goto Run }
	:: goto Run
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
	:: d_step { sameV[p] -> doCommit(p, snap); dl[p] = 1; same[p] = 1; sameV[p] = 1 };
		if :: planned -> goto Release :: !planned -> goto Run fi
	:: atomic { !sameV[p] && same[p] -> sameV[p] = 1; goto Commit }
	:: !sameV[p] && !same[p] -> goto Run
	:: atomic { sameV[p] && fkind == 0 -> fkind = COMMIT; fsnap = snap; fby = p;
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
		snap = 0 };
Send:	if
	:: d_step { sameV[p] -> doRelease(p) }; goto Run
	:: atomic { !sameV[p] && same[p] -> sameV[p] = 1; goto Send }
	:: !sameV[p] && !same[p] -> goto Run
	:: atomic { sameV[p] && fkind == 0 -> fkind = RELEASE; fby = p; goto Run }
	:: goto Run
	:: atomic { okind == 0 && same[p] -> okind = RELEASE; oby = p; goto Crash }
	:: goto Crash
	fi;

Crash:	atomic {
		ok[p] = 0; inrec[p] = 0;
		if
		:: skip                                           /* the agent alone */
		:: file[p] = 0; db[p] = 0; vol[p] = disk[p];       /* the host */
			if
			:: okind != 0 && oby == p -> okind = 0; osnap = 0; oby = 0; osameV = 0
			:: else
			fi
		fi;
		goto Run
	}
}

init {
	atomic {
		run World(); run Agent(0); run Agent(1)
	}
}
