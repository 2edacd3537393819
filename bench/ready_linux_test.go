package main

import (
	"bufio"
	"strings"
	"testing"
	"time"

	miekg "github.com/miekg/dns"
)

func TestCanServe(t *testing.T) {
	log := "time=2026-01-02T03:04:05.006Z level=INFO msg=\"session opened\"\n" +
		"time=2026-01-02T03:04:06.007Z level=DEBUG msg=\"task can serve\" task=a\n" +
		"time=2026-01-02T03:04:07.008Z level=DEBUG msg=\"task can serve\" task=b\n" +
		"time=2026-01-02T03:04:08.009Z level=INFO msg=other\n"
	at, err := canServe(bufio.NewScanner(strings.NewReader(log)))
	if want := time.Date(2026, 1, 2, 3, 4, 7, 8e6, time.UTC); err != nil || !at.Equal(want) {
		t.Errorf("%v, %v, want %v", at, err, want)
	}
	if _, err := canServe(bufio.NewScanner(strings.NewReader("time=2026-01-02T03:04:05.006Z msg=x\n"))); err == nil {
		t.Error("a log without the line is taken")
	}
}

func TestQuestion(t *testing.T) {
	var m miekg.Msg
	if err := m.Unpack(question("tasks.s1")); err != nil || len(m.Question) != 1 || m.Question[0].Name != "tasks.s1." || m.Question[0].Qtype != miekg.TypeA {
		t.Errorf("%v, %v", m.Question, err)
	}
}
