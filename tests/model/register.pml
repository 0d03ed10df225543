/*
 * register.pml: the register's file backend.
 *
 * A record is a symbolic link whose name is its number and whose target is the record. A
 * compare-and-swap makes the next number, which fails if the name exists, and looks afterwards
 * whether the predecessor's name still has the very file that was loaded. N contenders load and
 * swap for ever. Each may sleep between any two steps; a listing takes its time; the server may
 * execute a request late, or again and again (it has no reply cache) as long as its sender has
 * no answer, or never; a client may give up waiting, or crash and forget everything. Pruning
 * goes on beside them at any time, which is more than the protocol allows (only the holder
 * prunes).
 *
 * There is no time here: whatever a contender may do after some time, it may do at once.
 * So this model asks one question only: does "the swap counted" mean that it did, and is a
 * loaded record one that really was the newest? Terms and holders are in lease.pml.
 *
 * Attempts have no numbers: the file that was the first ever to get its number is the true one,
 * TRUE; one that a repeated request made after that was removed is a COPY: the true record, with
 * its nonce, in another file; anything else that gets a freed number is stray. No run ever loads
 * anything but TRUE without stopping at once with an error, so the predecessor that an attempt
 * for number n names is always the true n-1.
 *
 * Record 1 is answered before anybody learns of the register, so nothing of it is under way.
 *
 * What may be switched off:
 *   NO_PRED_CHECK     a link that was made is enough
 *   NO_PRED_READBACK  the predecessor is not looked up after "exists, but it is mine"
 *   NO_SAME_FILE      the predecessor is compared by its nonce, not by which file it is
 *   NO_LISTING        the newest record is found by walking up from the remembered one
 *   NO_ASCENDING      records are removed newest first
 *   NO_STOP_AT_ERROR  pruning goes on after a name that could not be removed
 *   NO_FRESH_NONCE    one nonce per contender instead of one per attempt
 *   NO_UNKNOWN        a request that timed out is taken for done
 *   NO_UNKNOWN_LOST   a request that timed out is taken for not done
 *   NO_LOAD_ANCHOR    a listing is believed whatever happened while it was read
 *   NO_ANCHOR         ... if a record was known before, but not compared
 *   NO_INSTANT        ... if none was known before
 *   NO_ANCHOR_FILE    the record that was known before is compared by its nonce
 *   LEARN_LATE        which file was made is learnt after the look at the predecessor
 * With SHOW, the model must reach a state that shows that it is not empty.
 */
#ifndef N
#define N     2      /* contenders */
#endif
#ifndef MAXV
#define MAXV  5      /* highest number */
#endif
#ifndef KEEP
#define KEEP  2      /* records that pruning leaves: 64 in the program */
#endif
#ifndef LATE
#define LATE  1      /* requests in flight whose sender no longer waits */
#endif
#ifndef PRUNERS
#define PRUNERS 1
#endif

/* What a number names. STRAY + p: a stray record of contender p's present attempt;
   STRAY + N + k: of late request k; NOBODYS: of neither. */
#define NONE    0
#define TRUE    1
#define COPY    2
#define NOBODYS 3
#define STRAY   4

/* What has become of an attempt: nothing yet, TRUE, or */
#define STRAYED 2

/* A contender that knows no record watches the directory while it lists it. */
#define WATCHED 1
#define CHANGED 2

/* Names of the rules, for the messages of assertions. They are never anything but 0. */
hidden byte swap_counted;
hidden byte loaded_record;
hidden byte known_file;
hidden byte swap_denied;
#ifdef SHOW
hidden byte shown;
bit  counted_late[N];
#endif

byte dir[MAXV + 2];
byte cur = 1;            /* the highest number ever made */
byte top[N];             /* highest name when a listing began; 0 once that is removed */
byte watch[N];
byte known[N];           /* the last record that was loaded or made; 0: none */
byte made[N];            /* what has become of the contender's present attempt */
byte want[N];            /* its number; 0: no attempt under way */
byte lwant[LATE], lmade[LATE];
#ifdef NO_FRESH_NONCE
byte lown[LATE];
byte maker[MAXV + 2];    /* contender whose nonce the record has */
#define LOWN(k) lown[k]
#else
#define LOWN(k) 0
#endif

hidden byte z, rs;

#define HIGHEST(res) res = MAXV; do :: dir[res] == NONE -> res-- :: else -> break od

/* The directory has changed, and number n (or 0) was removed. */
inline noticed(n) {
	z = 0;
	do
	:: z < N ->
		if :: watch[z] == WATCHED -> watch[z] = CHANGED :: else fi;
		if :: n != 0 && top[z] == n -> top[z] = 0 :: else fi;
		z++
	:: else -> break
	od;
	z = 0
}

/* The server executes symlink(number n). */
inline execMake(n, became, stray, who, res) {
	if
	:: dir[n] != NONE -> res = 2                      /* exists */
	:: else ->
		if
		:: n > cur -> cur = n; dir[n] = TRUE; became = TRUE
		:: n <= cur && became == TRUE -> dir[n] = COPY
		:: n <= cur && became != TRUE -> dir[n] = stray; became = STRAYED
		fi;
#ifdef NO_FRESH_NONCE
		maker[n] = who;
#endif
		noticed(0);
		res = 1
	fi
}

inline unlinkNumber(n) {
	dir[n] = NONE;
	noticed(n)
}

inline handOver(p, k) {
	lwant[k] = want[p]; lmade[k] = made[p];
	if :: dir[want[p]] == STRAY + p -> dir[want[p]] = STRAY + N + k :: else fi;
#ifdef NO_FRESH_NONCE
	lown[k] = p
#else
	z = 0
#endif
}

proctype Server(byte k) {
end:	do
	:: d_step { lwant[k] != 0 -> execMake(lwant[k], lmade[k], STRAY + N + k, LOWN(k), rs); rs = 0 }
	:: d_step { lwant[k] != 0 ->
		if :: dir[lwant[k]] == STRAY + N + k -> dir[lwant[k]] = NOBODYS :: else fi;
		lwant[k] = 0; lmade[k] = 0 }
	od
}

#ifdef NO_FRESH_NONCE
#define MINE(p) (maker[want[p]] == p)
#else
#define MINE(p) (((dir[want[p]] == TRUE || dir[want[p]] == COPY) && made[p] == TRUE) || dir[want[p]] == STRAY + p)
#endif

#ifdef NO_SAME_FILE
#define SAME(v) (dir[v] == TRUE || dir[v] == COPY)
#else
#define SAME(v) (dir[v] == TRUE)
#endif
#ifdef NO_ANCHOR_FILE
#define ANCHOR(v) (dir[v] == TRUE || dir[v] == COPY)
#else
#define ANCHOR(v) (dir[v] == TRUE)
#endif

proctype Contender(byte p) {
	byte v, r;
	byte file;                   /* what the record opened, or the number made, is */
#ifdef NO_LISTING
	v = 1;
#endif

	/* An attempt has ended, whatever came of it. */
Load:	atomic {
		true;
		d_step {
			if :: want[p] != 0 && dir[want[p]] == STRAY + p -> dir[want[p]] = NOBODYS :: else fi;
			want[p] = 0; made[p] = 0; r = 0; file = 0;
#ifdef NO_LISTING
			z = 0
		}
	};
	/* Walk up from the number remembered; list only when that is gone. */
Walk:	if
	:: d_step { dir[v + 1] != NONE -> v++ }; goto Walk
	:: d_step { dir[v + 1] == NONE && dir[v] != NONE -> file = dir[v] }
	:: d_step { dir[v + 1] == NONE && dir[v] == NONE -> HIGHEST(v); file = dir[v] }
	fi;
	assert(file == TRUE || loaded_record);
	if :: v >= MAXV -> goto Load :: else fi;
#else
			v = 0;
			HIGHEST(top[p]);
			if :: known[p] == 0 -> watch[p] = WATCHED :: else fi;
			z = 0
		}
	};
	/* A listing shows every name that is there throughout and of the others any. So its
	   highest may be any that is not below the highest of its beginning, or, when that
	   has been removed meanwhile, any at all. Then that record is read. */
	atomic {
		v = MAXV;
		do
		:: dir[v] != NONE && v >= top[p] -> break
		:: v > 1 -> v--
		:: v == 1 -> top[p] = 0; watch[p] = 0; goto Load
		od;
		top[p] = 0;
		file = dir[v]
	};
	/* Was nothing removed that the listing should have shown? */
	atomic {
#ifndef NO_LOAD_ANCHOR
		if
#ifndef NO_INSTANT
		:: known[p] == 0 && watch[p] == CHANGED -> watch[p] = 0; goto Load
#endif
#ifndef NO_ANCHOR
		:: known[p] != 0 && !(v >= known[p] && ANCHOR(known[p])) -> known[p] = 0; goto Load
#endif
		:: else
		fi;
#endif
		watch[p] = 0;
		assert(file == TRUE || loaded_record);
		known[p] = v;
		if
		:: v >= MAXV -> goto Load
		:: else
		fi
	};
#endif
	d_step { want[p] = v + 1; file = 0 };
Make:	atomic {
		if
		:: d_step { execMake(want[p], made[p], STRAY + p, p, r) }
		:: d_step { lwant[0] == 0 -> handOver(p, 0) }; goto GiveUp
#if LATE > 1
		:: d_step { lwant[0] != 0 && lwant[1] == 0 -> handOver(p, 1) }; goto GiveUp
#endif
		:: known[p] = 0; goto Load                 /* crashed */
		fi;
		if
		:: r = 0; goto Make                        /* the reply is lost: sent again */
		:: skip                                    /* answered, so nothing is in flight */
		fi;
		if
		:: r == 1 -> r = 0
		:: r == 2 -> r = 0; goto ReadBack
		fi
	};
#ifndef LEARN_LATE
Learn:	atomic {
		if
		:: dir[v + 1] == NONE -> goto Load         /* unknown */
		:: else -> file = dir[v + 1]
		fi
	};
#endif
	goto CheckPred;
ReadBack: atomic {
		if
		:: dir[v + 1] == NONE -> goto Load
		:: dir[v + 1] != NONE && !MINE(p) -> goto Load
		:: dir[v + 1] != NONE && MINE(p) ->
#ifdef SHOW
			counted_late[p] = 1;
#endif
#ifdef NO_PRED_READBACK
			goto Counted
#else
#ifdef LEARN_LATE
			goto CheckPred
#else
			goto Learn
#endif
#endif
		fi
	};
CheckPred:
#ifndef NO_PRED_CHECK
	atomic {
		if
		:: !SAME(v) -> goto Load                    /* unknown */
		:: else
		fi
	};
#endif
Counted:
	assert(made[p] == TRUE || swap_counted);
#ifdef LEARN_LATE
	atomic {
		if
		:: dir[v + 1] == NONE -> goto Load
		:: else -> file = dir[v + 1]
		fi
	};
#endif
#if !defined(NO_PRED_CHECK) && !defined(NO_PRED_READBACK) && !defined(NO_SAME_FILE) && !defined(NO_UNKNOWN)
	assert(file == TRUE || known_file);
#endif
#ifdef SHOW
	/* A swap counted although its reply was lost, after the first records had been removed. */
	assert(!(cur == MAXV && dir[1] == NONE && counted_late[p]) || shown);
#endif
	atomic { known[p] = v + 1; goto Load };

GiveUp:
#ifdef NO_UNKNOWN
	goto Counted;
#endif
#ifdef NO_UNKNOWN_LOST
	/* Taken for not done: so it must never turn out to be. */
	do
	:: lwant[0] == v + 1 && lmade[0] == TRUE -> assert(swap_denied)
	:: goto Load
	od;
#endif
	goto Load
}

/* Whoever holds, or once held, removes old records. */
proctype Pruner() {
	byte x, bound;

end:	/* All but the newest KEEP. */
	atomic { true; d_step {
		HIGHEST(bound);
		if :: bound > KEEP -> bound = bound - KEEP :: else -> bound = 0 fi;
		x = 0
	} };
#ifdef NO_ASCENDING
	x = bound;
	do
	:: d_step { x >= 1 -> unlinkNumber(x); x-- }
	:: x == 0 -> goto Rest
	:: goto Rest
	od;
#else
	x = 1;
	do
	:: d_step { x <= bound && dir[x] != NONE -> unlinkNumber(x); x++ }
	:: d_step { x <= bound && dir[x] == NONE -> x++ } /* "no such file" is no error */
	:: x > bound -> goto Rest
	:: goto Rest                                    /* any other error ends it; so does a crash */
#ifdef NO_STOP_AT_ERROR
	:: d_step { x <= bound -> x++ }
#endif
	od;
#endif
Rest:	atomic { x = 0; bound = 0; goto end }
}

init {
	atomic {
		dir[1] = TRUE;
#ifdef NO_FRESH_NONCE
		maker[1] = N;
#endif
		z = 0;
		do
		:: z < LATE -> run Server(z); z++
		:: else -> break
		od;
		z = 0;
		do
		:: z < N -> run Contender(z); z++
		:: else -> break
		od;
		z = 0;
		do
		:: z < PRUNERS -> run Pruner(); z++
		:: else -> break
		od;
		z = 0
	}
}
