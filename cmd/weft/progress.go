package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

const (
	// pollGap is how often the state of a service is asked for while waiting.
	pollGap = 100 * time.Millisecond
	// firstTask bounds the wait for the first task of a global service: it
	// has none if its constraints fit no node.
	firstTask = 3 * time.Second
)

// waiting says how a service is followed.
type waiting struct {
	quiet    bool // no progress
	rollback bool // the way back is what was asked for
}

// waitConverged follows a service until all its tasks run the newest version,
// printing each change of the count. An update that was paused is an error, and one
// that was rolled back, too.
func waitConverged(cmd *cobra.Command, api *client.Client, id string, w waiting) error {
	last, began := "", time.Now()
	back := "" // why the update is rolled back
	ticker := time.NewTicker(pollGap)
	defer ticker.Stop()
	for {
		s, err := api.ServiceInspect(cmd.Context(), id, client.ServiceInspectOptions{})
		if err != nil {
			return err
		}
		tasks, err := api.TaskList(cmd.Context(), client.TaskListOptions{Filters: client.Filters{}.Add("service", id).Add("_up-to-date", "true")})
		if err != nil {
			return err
		}
		running, want, why := count(s.Service, tasks.Items)
		line := fmt.Sprintf("%d/%d tasks run", running, want)
		if why != "" {
			line += ": " + why
		}
		if line != last && !w.quiet {
			fmt.Fprintln(cmd.ErrOrStderr(), line)
		}
		last = line
		updating, err := followUpdate(s.Service.UpdateStatus, w, &back)
		if err != nil {
			return err
		}
		unborn := s.Service.Spec.Mode.Global != nil && want == 0 && time.Since(began) < firstTask
		if running >= want && !updating && !unborn {
			if back != "" {
				return errors.New(back)
			}
			return nil
		}
		select {
		case <-cmd.Context().Done():
			return fmt.Errorf("stopped waiting; the service goes on by itself")
		case <-ticker.C:
		}
	}
}

// followUpdate says whether tasks are still being replaced. back becomes the reason
// once that is the way back, and nobody has asked for it.
func followUpdate(u *swarm.UpdateStatus, w waiting, back *string) (updating bool, err error) {
	if u == nil {
		return false, nil
	}
	switch u.State {
	case swarm.UpdateStatePaused:
		return false, fmt.Errorf("update paused: %s", u.Message)
	case swarm.UpdateStateRollbackPaused:
		return false, fmt.Errorf("rollback paused: %s", u.Message)
	case swarm.UpdateStateRollbackStarted:
		if !w.rollback {
			*back = u.Message
		}
		return true, nil
	case swarm.UpdateStateRollbackCompleted:
		if !w.rollback && *back == "" { // it was quicker than this
			*back = "the update was rolled back"
		}
		return false, nil
	}
	return u.State == swarm.UpdateStateUpdating, nil
}

// count returns running and wanted tasks and, for one that does not run, why.
func count(s swarm.Service, tasks []swarm.Task) (running, want uint64, why string) {
	if s.Spec.Mode.Replicated != nil && s.Spec.Mode.Replicated.Replicas != nil {
		want = *s.Spec.Mode.Replicated.Replicas
	}
	live := uint64(0)
	for _, t := range tasks {
		if t.DesiredState != swarm.TaskStateRunning {
			continue
		}
		live++
		if t.Status.State == swarm.TaskStateRunning {
			running++
		} else if t.Status.Err != "" {
			why = t.Status.Err
		}
	}
	if s.Spec.Mode.Global != nil {
		want = live
	}
	return running, want, why
}
