package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"mandos-escrow/internal/api"
)

// circle are the servers that a command acts on: those that a home is known to,
// or the one that --server or --state names.
type circle []*session

func (c circle) close() {
	for _, s := range c {
		s.close()
	}
}

// answer is what one server said.
type answer[T any] struct {
	*session
	value T
	err   error
}

// askAll asks all servers at once, and returns what they said in their order: one
// that does not answer costs the others nothing.
func askAll[T any](c circle, ask func(*session) (T, error)) []answer[T] {
	answers := make([]answer[T], len(c))
	var group sync.WaitGroup
	for i, s := range c {
		group.Go(func() {
			value, err := ask(s)
			answers[i] = answer[T]{s, value, err}
		})
	}
	group.Wait()
	return answers
}

// callAll makes the same call at all servers.
func callAll[T any](ctx context.Context, c circle, method, path string, in any) []answer[T] {
	return askAll(c, func(s *session) (out T, err error) {
		return out, s.Call(ctx, method, path, in, &out)
	})
}

// good are the answers that are no errors. The others are named, and are no reason
// to stop while one is good.
func good[T any](g *globals, answers []answer[T]) ([]answer[T], error) {
	kept := slices.DeleteFunc(slices.Clone(answers), func(a answer[T]) bool { return a.err != nil })
	if len(kept) == 0 {
		return nil, worst(answers)
	}
	for _, a := range answers {
		if a.err != nil {
			g.warn(a.fault().Error())
		}
	}
	return kept, nil
}

// fault is an error with the server's name, unless it has that already.
func (a answer[T]) fault() error {
	if strings.HasPrefix(a.err.Error(), a.Name+": ") {
		return a.err
	}
	return fmt.Errorf("%s: %w", safe(a.Name), a.err)
}

// worst is the error of answers of which none is good. What one server that
// answers says counts before what is not known of one that does not.
func worst[T any](answers []answer[T]) error {
	if len(answers) == 1 {
		return answers[0].err
	}
	var said, silent []error
	for _, a := range answers {
		switch {
		case a.err == nil:
		case errors.Is(a.err, api.ErrUnreachable):
			silent = append(silent, a.fault())
		default:
			said = append(said, a.fault())
		}
	}
	return errors.Join(append(said, silent...)...)
}

// lists fetches a list from every server.
func lists[T any](ctx context.Context, g *globals, path string) ([]answer[[]T], error) {
	c, err := g.connectAll(ctx)
	if err != nil {
		return nil, err
	}
	defer c.close()
	return good(g, callAll[[]T](ctx, c, "GET", path, nil))
}

// everywhere makes a change at every server that knows what it is about. It is
// done only when none of them failed.
func everywhere[T any](answers []answer[T]) (done []answer[T], err error) {
	var errs []error
	unknown := 0
	for _, a := range answers {
		switch {
		case a.err == nil:
			done = append(done, a)
		case api.CodeOf(a.err) == api.CodeNotFound:
			unknown++
		default:
			errs = append(errs, a.fault())
		}
	}
	switch {
	case len(answers) == 1 || unknown == len(answers):
		return done, answers[0].err
	case len(errs) > 0 && len(done) > 0:
		return done, fmt.Errorf("done at %s, and NOT everywhere: %w", namesOf(done), errors.Join(errs...))
	}
	return done, errors.Join(errs...)
}

func namesOf[T any](answers []answer[T]) string {
	var names []string
	for _, a := range answers {
		names = append(names, safe(a.Name))
	}
	return strings.Join(names, ", ")
}

// perServer is a text if it is the same at all servers, and otherwise each with
// its server.
func perServer[T any](answers []answer[T], text func(T) string) string {
	var all []string
	same := true
	for _, a := range answers {
		same = same && text(a.value) == text(answers[0].value)
		all = append(all, a.Name+": "+text(a.value))
	}
	if same {
		return text(answers[0].value)
	}
	return strings.Join(all, ", ")
}

// group puts what several servers list of one thing together, in the order of the
// first that lists it.
func group[T any](answers []answer[[]T], id func(T) string) (groups [][]answer[T]) {
	at := map[string]int{}
	for _, a := range answers {
		for _, item := range a.value {
			i, known := at[id(item)]
			if !known {
				i = len(groups)
				at[id(item)], groups = i, append(groups, nil)
			}
			groups[i] = append(groups[i], answer[T]{session: a.session, value: item})
		}
	}
	return groups
}

// ofServer is an item of one server's list.
type ofServer[T any] struct {
	Item   T      `json:"item"`
	Server string `json:"server"`
}

// listOfEach prints what each server lists; of one server as it is.
func listOfEach[T any](g *globals, answers []answer[[]T], header []string, row func(T) []string) error {
	if len(answers) == 1 {
		return list(g, answers[0].value, header, row)
	}
	items := []ofServer[T]{}
	for _, a := range answers {
		for _, item := range a.value {
			items = append(items, ofServer[T]{item, a.Name})
		}
	}
	return list(g, items, append([]string{"SERVER"}, header...), func(i ofServer[T]) []string {
		return append([]string{i.Server}, row(i.Item)...)
	})
}
