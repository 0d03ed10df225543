/*
 * gc.pml: commits, condemnations and deletions on the shared store.
 *
 * Threads write snapshots (or roll back), condemn, and sweep what was condemned. A thread
 * belongs to the term in which it last loaded the record and believes in it until it loads
 * again: so any of them may be a writer or a collector of the holder, or of a holder of
 * long ago that slept, and nothing here stops it. The term moves on at any moment, and so
 * does the version, by renewals. A swap may take effect after its sender gave up or
 * crashed, or never. There is no time: a grace period may be over at once, which is worse
 * than any real one.
 *
 * A snapshot is one object that refers to itself and, when it is a delta, to all that its
 * base refers to. The record retains a set of snapshots, the head among them, and names
 * the condemned objects. (In the program the catalog file does so, named by the record.)
 *
 * Terms, heads, gcseq and versions never come back to an old value, so whether a basis is
 * still true is one bit for each of them.
 *
 * What may be switched off:
 *   NO_COMMIT_GATE     a writer that believes it holds the lease sets head without a swap
 *   NO_CHECK_TERM      a commit or condemnation is retried on a newer version although the term changed
 *   NO_CHECK_HEAD      ... although head changed
 *   NO_CHECK_GCSEQ     ... although gcseq changed
 *   NO_TWO_COMMITS     what nothing refers to is unlinked without being condemned first
 *   NO_SEEN_CONDEMNED  the sweep does not wait for a condemnation of unknown outcome to be seen
 *   NO_AVOID           a rollback may refer to a condemned snapshot while its files exist
 *   NO_FRESH_NAMES     objects are named by content: what exists already is not written again
 *   NO_WRITTEN_FIRST   head is committed before its object is written
 *   NO_UNKNOWN         a writer removes its object when its commit timed out
 * With SHOW, the model must reach a state that shows that it is not empty.
 */
#ifndef T
#define T 2              /* threads */
#endif
#ifndef S
#define S 4              /* names that there are; 0 is the first snapshot */
#endif

hidden byte objects_exist, head, gc, shown;

#define BIT(x) (1 << (x))

byte hd;                 /* the record: head */
byte ret = 1;            /*             the retained snapshots, head among them */
byte cond;               /*             the condemned objects (those that still exist) */
byte ex = 1;             /* the objects that exist */
byte refs[S];            /* what a snapshot needs */
byte next = 1;           /* names used so far */

bit  sameV[T];           /* the version is still the one that the thread has loaded */
bit  same[T];            /* so is all of the basis that a retry compares: term, head, gcseq */
bit  true_[T];           /* ghost: so are term and head */

/* A swap that nobody waits for, as long as its base is still the newest version. */
#define COMMIT  1
#define CONDEMN 2
byte fkind;
byte fa, fb;             /* the new head; or the retained and the condemned */

hidden byte i, need;     /* only inside d_step */

#ifdef NO_AVOID
#define CHOICE (ret | cond)
#else
#define CHOICE ret
#endif
#ifdef NO_CHECK_TERM
#define TERM_MOVED(t)  true_[t] = 0
#else
#define TERM_MOVED(t)  same[t] = 0; true_[t] = 0
#endif
#ifdef NO_CHECK_HEAD
#define HEAD_MOVED(t)  true_[t] = 0
#else
#define HEAD_MOVED(t)  same[t] = 0; true_[t] = 0
#endif
#ifdef NO_CHECK_GCSEQ
#define GCSEQ_MOVED(t) skip
#else
#define GCSEQ_MOVED(t) same[t] = 0; true_[t] = 0
#endif

inline moved() {
	i = 0;
	do
	:: i < T -> sameV[i] = 0; i++
	:: else -> break
	od;
	fkind = 0; fa = 0; fb = 0; i = 0
}

/* All that the head and the retained snapshots need is there. Nobody will ask what a name
   refers to that neither the record nor the store knows. */
inline checkObjects() {
	i = 0; need = 0;
	do
	:: i < S -> if :: ret & BIT(i) -> need = need | refs[i] :: else fi; i++
	:: else -> break
	od;
	assert((need & ~ex) == 0 || objects_exist);
#ifdef SHOW
	/* The first snapshot is gone, a later one has been rolled back to. */
	assert(!(hd == S - 1 && !(ex & 1) && refs[hd] == (BIT(hd) | BIT(1)) && (refs[2] & BIT(1)) && (ret & BIT(2))) || shown);
#endif
	i = 0; need = 0;
	cond = cond & ex
}

inline commit(n, atBasis) {
	/* What is committed is of this term and descends from the head that it replaces. */
	assert(atBasis || head);
	hd = n; ret = ret | BIT(n);
	moved();
	do :: i < T -> HEAD_MOVED(i); i++ :: else -> break od;
	i = 0;
	checkObjects()
}

inline condemn(r, c) {
	assert(((r & BIT(hd)) && (r & ~ret) == 0) || gc);
	ret = r; cond = cond | c;
	moved();
	do :: i < T -> GCSEQ_MOVED(i); i++ :: else -> break od;
	i = 0;
	checkObjects()
}

inline load(t)   { sameV[t] = 1; same[t] = 1; true_[t] = 1 }
inline unload(t) { sameV[t] = 0; same[t] = 0; true_[t] = 0 }

/* Takeovers, renewals, and the swap in flight. */
proctype World() {
	byte n, r, c;

end:	do
	:: d_step {
		true;
		moved();
		do :: i < T -> TERM_MOVED(i); i++ :: else -> break od;
		i = 0
	}
	:: d_step { true; moved() }
	:: d_step { fkind == COMMIT -> n = fa; commit(n, 1); n = 0 }
	:: d_step { fkind == CONDEMN -> r = fa; c = fb; condemn(r, c); r = 0; c = 0 }
	:: d_step { fkind != 0 -> fkind = 0; fa = 0; fb = 0 }
	od
}

proctype Thread(byte t) {
	byte n, b;                   /* the new snapshot, its base */
	byte r, c, k;                /* what to retain, and to condemn */

Idle:	atomic { n = 0; b = 0; r = 0; c = 0; k = 0; unload(t) };
end:	if
	:: atomic { c = cond & ex; c != 0 -> goto Sweep }     /* what a committed record condemns */
	:: atomic { true -> load(t); goto Condemn }
	:: atomic { next < S -> load(t);
		/* The new snapshot's base: head, or for a rollback any retained one. */
		do
		:: (ret & BIT(b)) -> break
		:: b < S - 1 && (CHOICE >> (b + 1)) != 0 -> b++
#ifdef NO_AVOID
		:: (cond & BIT(b)) && refs[b] != 0 && (refs[b] & ~ex) == 0 -> break
#endif
		od;
		if
		:: n = next; next++; refs[n] = BIT(n) | refs[b]   /* a delta */
		:: n = next; next++; refs[n] = BIT(n)             /* everything */
#ifdef NO_FRESH_NAMES
		:: true;                                          /* the same blocks as once before */
			do
			:: n < next && refs[n] == BIT(n) && !(ret & BIT(n)) -> break
			:: n < S - 1 -> n++
			:: n == S - 1 -> goto Idle
			od
#endif
		fi;
		b = 0 }
	fi;
#ifndef NO_WRITTEN_FIRST
	atomic { ex = ex | BIT(n) };
#endif
Commit:	atomic {
		if
#ifdef NO_COMMIT_GATE
		:: true; d_step { commit(n, true_[t]) }; goto Done
#else
		:: sameV[t] -> d_step { commit(n, true_[t]) }; goto Done
		:: !sameV[t] && same[t] -> sameV[t] = 1; goto Commit
		:: !sameV[t] && !same[t] -> goto Idle         /* compute again; an orphan is left */
		:: fkind == 0 && sameV[t] -> fkind = COMMIT; fa = n; goto Unknown
#endif
		:: goto Idle                                      /* crashed, or nothing was sent */
		fi
	};
Unknown:
#ifdef NO_UNKNOWN
	atomic { true; d_step { ex = ex & ~BIT(n); checkObjects() } };
	goto Idle;
#else
	atomic { n = 0; r = 0; c = 0; same[t] = 0; true_[t] = 0 };
#endif
	/* Only a higher version settles it, and then all is looked up anew. */
end2:	!sameV[t];
	goto Idle;
Done:
#ifdef NO_WRITTEN_FIRST
	atomic { ex = ex | BIT(n) };
#endif
	goto Idle;

Condemn: atomic {
		/* Any of the retained snapshots but head may go. */
		r = ret;
		do
		:: k < S -> k++
		:: k < S && (r & BIT(k)) && k != hd -> r = r & ~BIT(k); k++
		:: k == S -> break
		od;
		k = 0;
		d_step {
			i = 0; need = 0;
			do
			:: i < S -> if :: r & BIT(i) -> need = need | refs[i] :: else fi; i++
			:: else -> break
			od;
			/* Orphans are condemned too, even those that may be about to be committed. */
			c = ex & ~need & ~cond;
			i = 0; need = 0
		};
		if :: c == 0 && r == ret -> goto Idle :: else fi
	};
#ifdef NO_TWO_COMMITS
	goto Sweep;
#endif
Swap:	atomic {
		if
		:: sameV[t] -> d_step { condemn(r, c) }; goto Idle
		:: !sameV[t] && same[t] -> sameV[t] = 1; goto Swap
		:: !sameV[t] && !same[t] -> goto Idle
		:: fkind == 0 && sameV[t] -> fkind = CONDEMN; fa = r; fb = c; goto Unknown2
		:: goto Idle
		fi
	};
Unknown2:
#ifdef NO_SEEN_CONDEMNED
	goto Sweep;
#else
	goto Unknown;
#endif

Sweep:	atomic { r = 0; n = 0; d_step { unload(t) } };
	/* In any order; it may sleep, lose the term, crash. */
	do
	:: atomic { c != 0 ->
		do
		:: k < S && (c & BIT(k)) -> break
		:: k < S && (c >> (k + 1)) != 0 -> k++
		od;
		true;
		d_step { ex = ex & ~BIT(k); c = c & ~BIT(k); k = 0; checkObjects() } }
	:: goto Idle
	od
}

init {
	atomic {
		refs[0] = 1;
		run World();
		i = 0;
		do
		:: i < T -> run Thread(i); i++
		:: else -> break
		od;
		i = 0
	}
}
