// Real Go's text/template behind a pipe: one JSON request a line on standard input, one JSON answer a line
// on standard output. Tests ask it what is right, the bench how long it takes.
package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"text/template"
	"time"
)

type request struct {
	Template   []byte            `json:"template"` // base64, as templates need not be UTF-8
	Data       json.RawMessage   `json:"data"`
	Num        string            `json:"num"` // "int": numbers without . or e are ints; else all are float64
	KV         map[string]string `json:"kv"`
	MissingKey string            `json:"missingkey"`
	Runs       int               `json:"runs"` // bench: execute so often and tell the times
	ParseRuns  int               `json:"parse_runs"`
}

type answer struct {
	Stage   string  `json:"stage"` // "" when all went well, else "parse" or "exec"
	Error   []byte  `json:"error"`
	Output  []byte  `json:"output"` // up to the error, if there was one
	Nanos   []int64 `json:"nanos,omitempty"`
	ParseNs []int64 `json:"parse_nanos,omitempty"`
}

func main() {
	in := bufio.NewReaderSize(os.Stdin, 1<<20)
	out := json.NewEncoder(os.Stdout)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 1 {
			var ask request
			if err := json.Unmarshal(line, &ask); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			out.Encode(reply(ask))
		}
		if err != nil {
			return
		}
	}
}

func reply(ask request) (told answer) {
	data, err := decode(ask.Data, ask.Num == "int")
	if err != nil {
		return answer{Stage: "data", Error: []byte(err.Error())}
	}
	functions := general()
	for name, function := range store(ask.KV) {
		functions[name] = function
	}
	parse := func() (*template.Template, error) {
		t := template.New("t").Funcs(functions)
		if ask.MissingKey != "" {
			t.Option("missingkey=" + ask.MissingKey)
		}
		return t.Parse(string(ask.Template))
	}
	for range ask.ParseRuns {
		began := time.Now()
		parse()
		told.ParseNs = append(told.ParseNs, time.Since(began).Nanoseconds())
	}
	t, err := parse()
	if err != nil {
		told.Stage, told.Error = "parse", []byte(err.Error())
		return told
	}
	var buffer bytes.Buffer
	for range max(ask.Runs, 1) {
		buffer.Reset()
		began := time.Now()
		err = t.Execute(&buffer, data)
		if ask.Runs > 0 {
			told.Nanos = append(told.Nanos, time.Since(began).Nanoseconds())
		}
	}
	if told.Output = buffer.Bytes(); err != nil {
		told.Stage, told.Error = "exec", []byte(err.Error())
	}
	return told
}

func decode(text json.RawMessage, ints bool) (data any, err error) {
	if len(text) == 0 {
		return nil, nil
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	if ints {
		decoder.UseNumber()
	}
	if err = decoder.Decode(&data); err == nil && ints {
		data = narrow(data)
	}
	return data, err
}

func narrow(v any) any {
	switch v := v.(type) {
	case json.Number:
		if i, err := strconv.Atoi(string(v)); err == nil {
			return i
		}
		f, _ := v.Float64()
		return f
	case []any:
		for i := range v {
			v[i] = narrow(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = narrow(v[k])
		}
	}
	return v
}

// KVPair is a key of the store with its value.
type KVPair struct{ Key, Value string }

// KVPairs is what gets returns.
type KVPairs []KVPair

func store(kv map[string]string) template.FuncMap {
	names := make([]string, 0, len(kv))
	for k := range kv {
		names = append(names, k)
	}
	sort.Strings(names)
	get := func(key string) (KVPair, error) {
		if v, ok := kv[key]; ok {
			return KVPair{key, v}, nil
		}
		return KVPair{}, errors.New("key does not exist: " + key)
	}
	gets := func(pattern string) (KVPairs, error) {
		found := KVPairs{}
		for _, k := range names {
			if ok, err := path.Match(pattern, k); err != nil {
				return nil, err
			} else if ok {
				found = append(found, KVPair{k, kv[k]})
			}
		}
		return found, nil
	}
	below := func(dir string, leaves bool) []string {
		seen := map[string]bool{}
		for _, k := range names {
			if leaves && k == path.Clean(dir) {
				seen[path.Base(k)] = true
			}
			if rest, ok := strings.CutPrefix(k, path.Clean(dir)+"/"); ok {
				if name, _, deeper := strings.Cut(rest, "/"); leaves || deeper {
					seen[name] = true
				}
			}
		}
		found := []string{}
		for name := range seen {
			found = append(found, name)
		}
		sort.Strings(found)
		return found
	}
	return template.FuncMap{
		"exists": func(key string) bool { _, ok := kv[key]; return ok },
		"get":    get,
		"getv": func(key string, fallback ...string) (string, error) {
			pair, err := get(key)
			if err != nil && len(fallback) > 0 {
				return fallback[0], nil
			}
			return pair.Value, err
		},
		"gets": gets,
		"getvs": func(pattern string) ([]string, error) {
			pairs, err := gets(pattern)
			values := []string{}
			for _, pair := range pairs {
				values = append(values, pair.Value)
			}
			sort.Strings(values)
			return values, err
		},
		"ls":    func(dir string) []string { return below(dir, true) },
		"lsdir": func(dir string) []string { return below(dir, false) },
	}
}

func general() template.FuncMap {
	return template.FuncMap{
		"echo":   func(v any) any { return v },
		"typeOf": func(v any) string { return fmt.Sprintf("%T", v) },
		"fail":   func(s string) (string, error) { return "", errors.New(s) },
		"die":    func() string { panic("die") },

		"add": func(a, b int) int { return a + b },
		"sub": func(a, b int) int { return a - b },
		"mul": func(a, b int) int { return a * b },
		"div": func(a, b int) int { return a / b },
		"mod": func(a, b int) int { return a % b },
		"seq": func(first, last int) []int {
			numbers := []int{}
			for ; first <= last; first++ {
				numbers = append(numbers, first)
			}
			return numbers
		},

		"atoi":       strconv.Atoi,
		"parseBool":  strconv.ParseBool,
		"base":       path.Base,
		"dir":        path.Dir,
		"split":      strings.Split,
		"join":       strings.Join,
		"replace":    strings.Replace,
		"toUpper":    strings.ToUpper,
		"toLower":    strings.ToLower,
		"contains":   strings.Contains,
		"trimSuffix": strings.TrimSuffix,
		"getenv": func(name string, fallback ...string) string {
			if v := os.Getenv(name); v != "" || len(fallback) == 0 {
				return v
			}
			return fallback[0]
		},
		"reverse": func(v any) any {
			if list, ok := v.([]string); ok {
				for i, j := 0, len(list)-1; i < j; i, j = i+1, j-1 {
					list[i], list[j] = list[j], list[i]
				}
			}
			return v
		},
		"json": func(text string) (v map[string]any, err error) {
			err = json.Unmarshal([]byte(text), &v)
			return v, err
		},
		"jsonArray": func(text string) (v []any, err error) {
			err = json.Unmarshal([]byte(text), &v)
			return v, err
		},
		"regexMatch": regexp.MatchString,
		"fileExists": func(name string) bool { _, err := os.Stat(name); return err == nil },
		"list":       func(values ...any) []any { return values },
		"trimPrefix": strings.TrimPrefix,
		"map": func(pairs ...any) (map[string]any, error) {
			if len(pairs)%2 != 0 {
				return nil, errors.New("invalid map call")
			}
			made := map[string]any{}
			for i := 0; i < len(pairs); i += 2 {
				key, ok := pairs[i].(string)
				if !ok {
					return nil, errors.New("map keys must be strings")
				}
				made[key] = pairs[i+1]
			}
			return made, nil
		},
		"base64Encode": func(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) },
		"base64Decode": func(text string) (string, error) {
			decoded, err := base64.StdEncoding.DecodeString(text)
			return string(decoded), err
		},
	}
}
