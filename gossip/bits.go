package gossip

import (
	"encoding/binary"
	"math/bits"
)

// bitWriter writes numbers of any length in bits, lowest first.
type bitWriter struct {
	b  []byte // eight more than are full
	at uint   // in bits
}

// oneGo is how many bits can be written, or read, at once wherever a byte begins.
const oneGo = 57

// reset begins anew.
func (w *bitWriter) reset() { w.b, w.at = append(w.b[:0], make([]byte, 8)...), 0 }

// put writes the lowest width bits of v; there must be no others.
func (w *bitWriter) put(v uint64, width uint) {
	if width > oneGo {
		w.put(v&(1<<32-1), 32)
		v, width = v>>32, width-32
	}
	i := w.at >> 3
	binary.LittleEndian.PutUint64(w.b[i:], uint64(w.b[i])|v<<(w.at&7))
	w.at += width
	if more := w.at>>3 - i; more > 0 {
		w.b = append(w.b, make([]byte, more)...)
	}
}

// number writes v in code k, best for numbers of k bits or fewer, which take
// 1+k: as many zeros as v has bits above the lowest k, a one, these bits but for the
// first, and the lowest k. This is Elias' gamma code with a tail (P. Elias, Universal
// codeword sets, 1975).
func (w *bitWriter) number(v uint64, k uint) {
	high := v >> k
	l := uint(bits.Len64(high))
	switch low := v & (1<<k - 1); {
	case l == 0:
		w.put(1|low<<1, 1+k)
		return
	case 2*l+k <= oneGo:
		w.put(1<<l|(high&^(1<<(l-1)))<<(l+1)|low<<(2*l), 2*l+k)
		return
	}
	w.put(0, l)
	w.put(1, 1)
	if l > 1 {
		w.put(high&^(1<<(l-1)), l-1)
	}
	w.put(v&(1<<k-1), k)
}

// head writes three bits that are zero most often.
func (w *bitWriter) head(v uint64) {
	if v == 0 {
		w.put(0, 1)
		return
	}
	w.put(1|v<<1, 4)
}

// end returns what was written, in whole bytes.
func (w *bitWriter) end() []byte { return w.b[:(w.at+7)/8] }

// bestCode is the code in which numbers take the fewest bits; lengths says how many
// of them have how many bits.
func bestCode(lengths *[65]int) (best uint) {
	top := 64
	for top > 0 && lengths[top] == 0 {
		top--
	}
	least := -1
	for k := 0; k <= min(top, 63); k++ {
		sum := 0
		for l := 0; l <= top; l++ {
			sum += lengths[l] * (1 + k + max(0, 2*(l-k)-1))
		}
		if least < 0 || sum < least {
			least, best = sum, uint(k)
		}
	}
	return best
}

// bitReader reads what a bitWriter has written, which eight more bytes follow.
type bitReader struct {
	b  []byte
	at uint // in bits
}

// peek returns oneGo bits or more, and zeros above.
func (r *bitReader) peek() uint64 {
	return binary.LittleEndian.Uint64(r.b[r.at>>3:]) >> (r.at & 7)
}

func (r *bitReader) take(width uint) uint64 {
	if width > oneGo {
		low := r.take(32)
		return low | r.take(width-32)<<32
	}
	v := r.peek() & (1<<width - 1)
	r.at += width
	return v
}

func (r *bitReader) number(k uint) uint64 {
	var l uint
	for {
		zeros := uint(bits.TrailingZeros64(r.peek()))
		if zeros < oneGo {
			l += zeros
			r.at += zeros + 1
			break
		}
		l += oneGo
		r.at += oneGo
	}
	var high uint64
	if l > 0 {
		high = 1<<(l-1) | r.take(l-1)
	}
	return high<<k | r.take(k)
}

func (r *bitReader) head() uint64 {
	if r.take(1) == 0 {
		return 0
	}
	return r.take(3)
}
