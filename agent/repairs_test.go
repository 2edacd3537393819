package agent

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft"
)

func TestRepairsAreCountedByKind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := NewRepairs(slog.New(slog.NewTextHandler(&log, nil)))
		began := time.Now()
		time.Sleep(time.Minute)
		for range 2 {
			r.Record(weft.Repair{Kind: "fdb missing", Object: "fdb 1", Reason: "it was gone"})
		}
		time.Sleep(time.Minute)
		r.Record(weft.Repair{Kind: "device wrong", Object: "wx4097", Reason: "it was down"})
		r.Record(weft.Repair{Kind: "fdb missing", Object: "fdb 2", Reason: "it was gone"})
		since, counts := r.Repairs()
		want := []weft.RepairCount{
			{Kind: "device wrong", Count: 1, Last: began.Add(2 * time.Minute), Object: "wx4097", Reason: "it was down"},
			{Kind: "fdb missing", Count: 3, Last: began.Add(2 * time.Minute), Object: "fdb 2", Reason: "it was gone"},
		}
		if !since.Equal(began) || len(counts) != 2 || counts[0] != want[0] || counts[1] != want[1] {
			t.Errorf("since %s: %+v, want since %s: %+v", since, counts, began, want)
		}
		if n := strings.Count(log.String(), "msg=repaired"); n != 4 || !strings.Contains(log.String(), `kind="device wrong" object=wx4097 reason="it was down"`) {
			t.Errorf("log:\n%s", log.String())
		}
	})
}

func TestRepairsFromManyEngines(t *testing.T) {
	r := NewRepairs(slog.New(slog.DiscardHandler))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				r.Record(weft.Repair{Kind: "fdb missing"})
				r.Repairs()
			}
		})
	}
	wg.Wait()
	if _, c := r.Repairs(); len(c) != 1 || c[0].Count != 800 {
		t.Errorf("%+v", c)
	}
}
