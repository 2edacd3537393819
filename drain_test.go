package weft_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

func TestDrainTime(t *testing.T) {
	for _, c := range []struct {
		label string
		want  time.Duration
		bad   bool
	}{
		{label: "25s", want: 25 * time.Second}, {label: "0s"}, {label: "0"}, {label: "1h", want: time.Hour}, {label: "1m30s", want: 90 * time.Second},
		{label: "", bad: true}, {label: "25", bad: true}, {label: "-1s", bad: true}, {label: "1h1ns", bad: true}, {label: "soon", bad: true},
	} {
		s := weft.ServiceSpec{Name: "web", Container: weft.ContainerSpec{Image: "weft/whoami"}, Labels: map[string]string{"weft.drain": c.label, "a": "b"}}
		s.Defaults()
		err := s.Validate()
		if (err != nil) != c.bad || s.DrainTime() != c.want {
			t.Errorf("%q: %s, %v", c.label, s.DrainTime(), err)
		}
		if err != nil && (!errors.Is(err, weft.ErrInvalid) || !strings.HasPrefix(err.Error(), `Labels["weft.drain"]: `)) {
			t.Errorf("%q: %v", c.label, err)
		}
	}
	if d := (&weft.ServiceSpec{}).DrainTime(); d != 0 {
		t.Errorf("without a label: %s", d)
	}
}
