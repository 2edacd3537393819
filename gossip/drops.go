package gossip

import "time"

// dropsEvery is how often operators are told of dropped frames at most, and of a seed with
// another key, our own choice.
const dropsEvery = time.Minute

// drops are the frames dropped so far, as operators were last told of them.
type drops struct {
	told Stats
	next time.Time // the earliest moment of the next word
}

// look returns what has been dropped since, as attributes of a log line by the names of
// Stats; none if there is nothing, or not yet anything, to tell. Of a node that is no
// member nothing is told: members come to know each other so.
func (d *drops) look(now time.Time, s Stats) (attrs []any) {
	if now.Before(d.next) {
		return nil
	}
	for _, c := range []struct {
		name      string
		then, now uint64
	}{
		{"foreign", d.told.Foreign, s.Foreign},
		{"unauthentic", d.told.Unauthentic, s.Unauthentic},
		{"replayed", d.told.Replayed, s.Replayed},
		{"oversized", d.told.Oversized, s.Oversized},
		{"malformed", d.told.Malformed, s.Malformed},
		{"refused", d.told.Refused, s.Refused},
		{"crowded", d.told.Crowded, s.Crowded},
		{"sessions", d.told.SessionsBad, s.SessionsBad},
	} {
		if c.now > c.then {
			attrs = append(attrs, c.name, c.now-c.then)
		}
	}
	if len(attrs) > 0 {
		d.told, d.next = s, now.Add(dropsEvery)
	}
	return attrs
}
