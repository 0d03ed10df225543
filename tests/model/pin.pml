/*
 * pin.pml: readers of old snapshots, and deletions that leave alone what they have pinned.
 *
 * A reader finds a snapshot in the record, writes a pin that names it, loads the record
 * again, and reads the objects one after the other if the snapshot is still retained. A
 * collector looks up the pins after it has seen the condemnation committed, and unlinks
 * what no pin covers; it may sleep between any two steps, so that it may be one of long
 * ago. There is no time: a reader may take for ever, and so may a sweep. What time is for
 * (a pin that nobody renews is dropped; a directory's listing may be a minute old) is not
 * in the model: a listing from before the condemnation is PINS_BEFORE.
 *
 * What may be switched off:
 *   NO_PINS          the sweep doesn't look at pins
 *   PINS_BEFORE      it looks them up before the condemnation has been committed
 *   NO_SECOND_LOOK   a reader doesn't load the record again after its pin has been written
 *   CONDEMNED_ONLY   it only makes sure that the record doesn't condemn the snapshot
 *   PIN_AFTER        the second look comes first, and then the pin
 * With SHOW, the model must reach a state that shows that it is not empty.
 */
#ifndef R
#define R 1              /* readers: they don't notice each other */
#endif
#ifndef S
#define S 4              /* names that there are */
#endif

#define BIT(x) (1 << (x))

hidden byte pinned_read, shown;

byte hd;                 /* the record: head */
byte ret = 1;            /*             the retained snapshots */
byte cond;               /*             the condemned objects that still exist */
byte ex = 1;             /* the objects that exist */
byte refs[S];            /* what a snapshot needs */
byte next = 1;           /* names used so far */
byte pin[R];             /* the objects that a reader's pin covers */

hidden byte i, need;     /* only inside d_step */

inline needed(set) {
	i = 0; need = 0;
	do
	:: i < S -> if :: (set) & BIT(i) -> need = need | refs[i] :: else fi; i++
	:: else -> break
	od;
	i = 0
}

/* New snapshots, on top of head or on their own, and condemnations: always right here. */
proctype Holder() {
	byte k, r;

end:	do
	:: d_step { next < S -> ex = ex | BIT(next); refs[next] = BIT(next) | refs[hd];
		hd = next; ret = ret | BIT(next); next++ }
	:: d_step { next < S -> ex = ex | BIT(next); refs[next] = BIT(next);
		hd = next; ret = ret | BIT(next); next++ }
	:: atomic {
		r = ret;
		do
		:: k < S -> k++
		:: k < S && (r & BIT(k)) && k != hd -> r = r & ~BIT(k); k++
		:: k == S -> break
		od;
		k = 0;
		d_step { needed(r); ret = r; cond = (cond | (ex & ~need)) & ex; need = 0; r = 0 }
	}
	od
}

proctype Collector() {
	byte c, p, k;

Idle:	atomic { c = 0; p = 0; k = 0 };
#ifdef PINS_BEFORE
	d_step { i = 0; do :: i < R -> p = p | pin[i]; i++ :: else -> break od; i = 0 };
#endif
end:	atomic { cond & ex -> c = cond & ex };
#ifndef NO_PINS
#ifndef PINS_BEFORE
	d_step { i = 0; do :: i < R -> p = p | pin[i]; i++ :: else -> break od; i = 0 };
#endif
	c = c & ~p;
#endif
	do
	:: atomic { c != 0 ->
		do
		:: k < S && (c & BIT(k)) -> break
		:: k < S && (c >> (k + 1)) != 0 -> k++
		od;
		true;
		d_step { ex = ex & ~BIT(k); c = c & ~BIT(k); cond = cond & ex; k = 0 } }
	:: goto Idle
	od
}

proctype Reader(byte t) {
	byte n, want;
	bit ok;

Idle:	atomic { want = 0; n = 0; ok = 0; pin[t] = 0 };
end:	atomic {
		do
		:: (ret & BIT(n)) -> break
		:: n < S - 1 && (ret >> (n + 1)) != 0 -> n++
		od;
		want = refs[n]
	};
#ifdef PIN_AFTER
	ok = (ret & BIT(n)) != 0;
	pin[t] = want;
#else
	pin[t] = want;
#ifdef NO_SECOND_LOOK
	ok = 1;
#else
#ifdef CONDEMNED_ONLY
	ok = (cond & want) == 0;
#else
	ok = (ret & BIT(n)) != 0;
#endif
#endif
#endif
	if
	:: !ok -> goto Idle
	:: else
	fi;
	n = 0;
	do
	:: atomic { want != 0 ->
		do
		:: (want & BIT(n)) -> break
		:: else -> n++
		od;
		assert((ex & BIT(n)) || pinned_read);
#ifdef SHOW
		/* It reads what has been condemned meanwhile, and something else is gone. */
		assert(!((cond & BIT(n)) && next == S && (ex & 2) == 0) || shown);
#endif
		want = want & ~BIT(n); n = 0 }
	:: goto Idle               /* done, or given up */
	od
}

init {
	atomic {
		refs[0] = 1;
		run Holder();
		run Collector();
		run Collector();
		i = 0;
		do
		:: i < R -> run Reader(i); i++
		:: else -> break
		od;
		i = 0
	}
}
