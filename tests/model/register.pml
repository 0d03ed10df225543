/*
 * register.pml: the register's file backend.
 *
 * A record is a file whose name is its number. A compare-and-swap makes a temporary file,
 * links it to the next number and looks the predecessor up again. N contenders load and
 * swap for ever. Each may sleep between any two steps; a listing takes its time; the
 * server may execute a link late, or twice (it has no reply cache), or never; a client may
 * give up waiting, or crash. Pruning goes on beside them at any time, which is more than
 * the protocol allows (only the holder prunes).
 *
 * There is no time here: whatever a contender may do after some time, it may do at once.
 * So this model asks one question only: does "the swap counted" mean that it did, and is a
 * loaded record one that really was the newest? Terms and holders are in lease.pml.
 *
 * Attempts have no numbers: the record that was the first ever to get its number is the
 * true one, TRUE; one that gets a number that had been freed is stray. No model run ever
 * loads a stray record without stopping at once with an error, so the predecessor that an
 * attempt for number n names is always the true n-1.
 *
 * What may be switched off:
 *   NO_PRED_CHECK     a successful link is enough
 *   NO_PRED_READBACK  the predecessor is not looked up after "exists, but it is mine"
 *   NO_LISTING        the newest record is found by walking up from the remembered one
 *   NO_ASCENDING      records are removed newest first
 *   NO_STOP_AT_ERROR  pruning goes on after a name that could not be removed
 *   NO_FRESH_NONCE    one nonce per contender instead of one per attempt
 *   NO_UNKNOWN        a link that timed out is taken for done
 *   NO_UNKNOWN_LOST   a link that timed out is taken for not done
 *   NO_TMP_FIRST      pruning leaves the temporary names of old attempts alone
 *   NO_LOAD_PRED      a loaded record's predecessor is not looked up
 *   NO_LOAD_NONCE     it is, but any record will do (no violation was found)
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
#define NOBODYS 2
#define STRAY   3

/* What has become of an attempt: nothing yet, TRUE, or */
#define STRAYED 2

/* Names of the rules, for the messages of assertions. They are never anything but 0. */
hidden byte swap_counted;
hidden byte loaded_record;
hidden byte swap_denied;
#ifdef SHOW
hidden byte shown;
bit  counted_late[N];
#endif

byte dir[MAXV + 2];
byte cur = 1;            /* the highest number ever made */
byte top[N];             /* highest name when a listing began; 0 once that is removed */
byte made[N];            /* what has become of the contender's present attempt */
bit  tmp[N];             /* its temporary name exists */
byte want[N];            /* its number; 0: no attempt under way */
byte lwant[LATE], lmade[LATE];
bit  ltmp[LATE];
#ifdef NO_FRESH_NONCE
byte lown[LATE];
byte maker[MAXV + 2];    /* contender whose nonce the record has */
#define LOWN(k) lown[k]
#else
#define LOWN(k) 0
#endif

hidden byte z, rs, top0;

#define HIGHEST(res) res = MAXV; do :: dir[res] == NONE -> res-- :: else -> break od

/* The server executes link(a temporary name, number n). */
inline execLink(there, n, became, stray, who, res) {
	if
	:: !there -> res = 3                              /* no such file */
	:: there && dir[n] != NONE -> res = 2             /* exists */
	:: there && dir[n] == NONE ->
		if
		:: n > cur -> cur = n; dir[n] = TRUE; became = TRUE
		:: n <= cur && became == TRUE -> dir[n] = TRUE
		:: n <= cur && became != TRUE -> dir[n] = stray; became = STRAYED
		fi;
#ifdef NO_FRESH_NONCE
		maker[n] = who;
#endif
		res = 1
	fi;
	z = 0
}

inline unlinkNumber(n) {
	dir[n] = NONE;
	z = 0;
	do
	:: z < N -> if :: top[z] == n -> top[z] = 0 :: else fi; z++
	:: else -> break
	od;
	z = 0
}

inline handOver(p, k) {
	lwant[k] = want[p]; lmade[k] = made[p]; ltmp[k] = tmp[p];
	if :: dir[want[p]] == STRAY + p -> dir[want[p]] = STRAY + N + k :: else fi;
#ifdef NO_FRESH_NONCE
	lown[k] = p
#else
	z = 0
#endif
}

proctype Server(byte k) {
end:	do
	:: d_step { lwant[k] != 0 -> execLink(ltmp[k], lwant[k], lmade[k], STRAY + N + k, LOWN(k), rs); rs = 0 }
	:: d_step { lwant[k] != 0 ->
		if :: dir[lwant[k]] == STRAY + N + k -> dir[lwant[k]] = NOBODYS :: else fi;
		lwant[k] = 0; lmade[k] = 0; ltmp[k] = 0 }
	od
}

#ifdef NO_FRESH_NONCE
#define MINE(p) (maker[want[p]] == p)
#else
#define MINE(p) ((dir[want[p]] == TRUE && made[p] == TRUE) || dir[want[p]] == STRAY + p)
#endif

proctype Contender(byte p) {
	byte v, r;
	bit stray;                   /* the record opened is a stray one */
#ifdef NO_LISTING
	v = 1;
#endif

Load:	atomic {
		true;
		d_step {
			if :: want[p] != 0 && dir[want[p]] == STRAY + p -> dir[want[p]] = NOBODYS :: else fi;
			want[p] = 0; made[p] = 0; tmp[p] = 0; r = 0; stray = 0;
#ifdef NO_LISTING
			z = 0
		}
	};
	/* Walk up from the number remembered; list only when that is gone. */
Walk:	if
	:: d_step { dir[v + 1] != NONE -> v++ }; goto Walk
	:: d_step { dir[v + 1] == NONE && dir[v] != NONE -> stray = (dir[v] != TRUE) }
	:: d_step { dir[v + 1] == NONE && dir[v] == NONE -> HIGHEST(v); stray = (dir[v] != TRUE) }
	fi;
#else
			v = 0;
			HIGHEST(top[p]); z = 0
		}
	};
	/* A listing shows every name that is there throughout and of the others any. So its
	   highest may be any that is not below the highest of its beginning, or, when that
	   has been removed meanwhile, any at all. Then that record is opened. */
	atomic {
		v = MAXV;
		do
		:: dir[v] != NONE && v >= top[p] -> break
		:: v > 1 -> v--
		:: v == 1 -> goto Load
		od;
		top[p] = 0;
		stray = (dir[v] != TRUE)
	};
#endif
	atomic {
#if !defined(NO_LOAD_PRED) && !defined(NO_LISTING)
		/* The predecessor is still there, and is the one that the record names. */
		if
#ifdef NO_LOAD_NONCE
		:: v > 1 && dir[v - 1] == NONE -> goto Load
#else
		:: v > 1 && dir[v - 1] != TRUE -> goto Load
#endif
		:: else
		fi;
#endif
		assert(!stray || loaded_record);
		if
		:: v >= MAXV -> goto Load
		:: else
		fi
	};
	d_step { want[p] = v + 1; tmp[p] = 1 };
Link:	atomic {
		if
		:: d_step { execLink(tmp[p], want[p], made[p], STRAY + p, p, r) }
		:: d_step { lwant[0] == 0 -> handOver(p, 0) }; goto GiveUp
#if LATE > 1
		:: d_step { lwant[0] != 0 && lwant[1] == 0 -> handOver(p, 1) }; goto GiveUp
#endif
		:: goto Load                               /* crashed */
		fi;
		if
		:: r = 0; goto Link                        /* the reply is lost: sent again */
		:: skip
		fi;
		tmp[p] = 0;                                /* answered, so nothing is in flight */
		if
		:: r == 1 -> r = 0; goto CheckPred
		:: r == 2 -> r = 0; goto ReadBack
		:: r == 3 -> r = 0; goto Load
		fi
	};
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
			goto CheckPred
#endif
		fi
	};
CheckPred:
#ifndef NO_PRED_CHECK
	atomic {
		if
		:: dir[v] != TRUE -> goto Load              /* unknown */
		:: else
		fi
	};
#endif
Counted:
	assert(made[p] == TRUE || swap_counted);
#ifdef SHOW
	/* A swap counted although its reply was lost, after the first records had been removed. */
	assert(!(cur == MAXV && dir[1] == NONE && counted_late[p]) || shown);
#endif
	goto Load;

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

end:	/* All but the newest KEEP. The temporary names for those numbers go first. (That one
	   appears between listing and removing them is the same as that it appears later.) */
	atomic { true; d_step {
		HIGHEST(bound);
		if :: bound > KEEP -> bound = bound - KEEP :: else -> bound = 0 fi;
#ifndef NO_TMP_FIRST
		x = 0; do :: x < N -> if :: want[x] <= bound -> tmp[x] = 0 :: else fi; x++ :: else -> break od;
		x = 0; do :: x < LATE -> if :: lwant[x] <= bound -> ltmp[x] = 0 :: else fi; x++ :: else -> break od;
#endif
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
		/* The request that made record 1 may still be under way, to be executed again. */
		lwant[0] = 1; ltmp[0] = 1; lmade[0] = TRUE;
#ifdef NO_FRESH_NONCE
		lown[0] = N; maker[1] = N;
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
