// Real Go's fmt, strconv, encoding/json, regexp and time behind a pipe: one JSON request a line on standard
// input, one JSON answer a line on standard output. Tests ask it what is right.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"text/template"
	"time"
)

type KVPair struct{ Key, Value string }
type KVPairs []KVPair

type request struct {
	Op   string            `json:"op"`
	Args []json.RawMessage `json:"args"` // values, see decode
}

type answer struct {
	Text  []byte `json:"text"`
	Error []byte `json:"error"`
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// decode makes a Go value from its tagged form: null, or [tag, content...]; strings are base64.
func decode(raw json.RawMessage) any {
	if string(raw) == "null" {
		return nil
	}
	var parts []json.RawMessage
	check(json.Unmarshal(raw, &parts))
	tag := text(parts[0])
	switch tag {
	case "string":
		return str(parts[1])
	case "bool":
		return text(parts[1]) == "true"
	case "float64":
		return float(parts[1])
	case "complex128":
		return complex(float(parts[1]), float(parts[2]))
	case "int":
		return int(integer(parts[1]))
	case "int64":
		return integer(parts[1])
	case "uint8":
		return uint8(integer(parts[1]))
	case "uint16":
		return uint16(integer(parts[1]))
	case "duration":
		return time.Duration(integer(parts[1]))
	case "month":
		return time.Month(integer(parts[1]))
	case "weekday":
		return time.Weekday(integer(parts[1]))
	case "list":
		list := []any{}
		for _, part := range parts[1:] {
			list = append(list, decode(part))
		}
		return list
	case "strings":
		list := []string{}
		for _, part := range parts[1:] {
			list = append(list, str(part))
		}
		return list
	case "ints":
		list := []int{}
		for _, part := range parts[1:] {
			list = append(list, int(integer(part)))
		}
		return list
	case "map":
		m := map[string]any{}
		for i := 1; i < len(parts); i += 2 {
			m[str(parts[i])] = decode(parts[i+1])
		}
		return m
	case "pair":
		return KVPair{str(parts[1]), str(parts[2])}
	case "pairs":
		list := KVPairs{}
		for _, part := range parts[1:] {
			list = append(list, decode(part).(KVPair))
		}
		return list
	}
	check(errors.New("no such tag: " + tag))
	return nil
}

func text(raw json.RawMessage) (s string) {
	check(json.Unmarshal(raw, &s))
	return
}

func str(raw json.RawMessage) string {
	var b []byte
	check(json.Unmarshal(raw, &b))
	return string(b)
}

func integer(raw json.RawMessage) int64 {
	n, err := strconv.ParseInt(text(raw), 10, 64)
	check(err)
	return n
}

func float(raw json.RawMessage) float64 {
	f, err := strconv.ParseFloat(text(raw), 64)
	check(err)
	return f
}

func try(err error, value any) (string, error) {
	return fmt.Sprintf("%#v", value), err
}

func reply(op string, a []any) (result string, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	s := func(i int) string { return a[i].(string) }
	n := func(i int) int { return a[i].(int) }
	switch op {
	case "sprintf":
		return fmt.Sprintf(s(0), a[1:]...), nil
	case "sprint":
		return fmt.Sprint(a...), nil
	case "sprintln":
		return fmt.Sprintln(a...), nil
	case "quote":
		return strconv.Quote(s(0)), nil
	case "unquote":
		return strconv.Unquote(s(0))
	case "float":
		return strconv.FormatFloat(a[0].(float64), s(1)[0], n(2), 64), nil
	case "html":
		return template.HTMLEscaper(a...), nil
	case "js":
		return template.JSEscaper(a...), nil
	case "urlquery":
		return template.URLQueryEscaper(a...), nil
	case "json":
		var v map[string]any
		err := json.Unmarshal([]byte(s(0)), &v)
		return try(err, v)
	case "jsonArray":
		var v []any
		err := json.Unmarshal([]byte(s(0)), &v)
		return try(err, v)
	case "fromJson":
		var v any
		err := json.Unmarshal([]byte(s(0)), &v)
		return try(err, v)
	case "toJson":
		b, err := json.Marshal(a[0])
		return string(b), err
	case "toPrettyJson":
		b, err := json.MarshalIndent(a[0], "", "  ")
		return string(b), err
	case "regexMatch":
		ok, err := regexp.MatchString(s(0), s(1))
		return fmt.Sprint(ok), err
	case "regexFind":
		re, err := regexp.Compile(s(0))
		if err != nil {
			return "", err
		}
		return re.FindString(s(1)), nil
	case "regexReplaceAll":
		re, err := regexp.Compile(s(0))
		if err != nil {
			return "", err
		}
		return re.ReplaceAllString(s(1), s(2)), nil
	case "base64Decode":
		b, err := base64.StdEncoding.DecodeString(s(0))
		return string(b), err
	case "base64Encode":
		return base64.StdEncoding.EncodeToString([]byte(s(0))), nil
	case "sha256sum":
		return fmt.Sprintf("%x", sha256.Sum256([]byte(s(0)))), nil
	case "atoi":
		n, err := strconv.Atoi(s(0))
		return fmt.Sprint(n), err
	case "parseBool":
		b, err := strconv.ParseBool(s(0))
		return fmt.Sprint(b), err
	case "toUpper":
		return strings.ToUpper(s(0)), nil
	case "toLower":
		return strings.ToLower(s(0)), nil
	case "split":
		return fmt.Sprintf("%q", strings.Split(s(0), s(1))), nil
	case "replace":
		return strings.Replace(s(0), s(1), s(2), n(3)), nil
	case "base":
		return path.Base(s(0)), nil
	case "dir":
		return path.Dir(s(0)), nil
	case "time": // unix seconds, nanoseconds, zone name, offset, then a method and its arguments
		zone := time.FixedZone(s(2), n(3))
		if s(2) == "UTC" {
			zone = time.UTC
		}
		return method(time.Unix(int64(n(0)), int64(n(1))).In(zone), s(4), a[5:])
	case "duration":
		return method(a[0].(time.Duration), s(1), a[2:])
	}
	return "", errors.New("no such op: " + op)
}

// method calls one as a template does.
func method(receiver any, name string, a []any) (string, error) {
	t, err := template.New("t").Parse("{{printf \"%v %T\" (.r." + name + list(len(a)) + ") (.r." + name + list(len(a)) + ")}}")
	if err != nil {
		return "", err
	}
	var out strings.Builder
	err = t.Execute(&out, map[string]any{"r": receiver, "a": a})
	return out.String(), err
}

func list(n int) (s string) {
	for i := range n {
		s += fmt.Sprintf(" (index .a %d)", i)
	}
	return
}

func main() {
	in := bufio.NewReaderSize(os.Stdin, 1<<20)
	out := bufio.NewWriter(os.Stdout)
	encoder := json.NewEncoder(out)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 1 {
			var ask request
			check(json.Unmarshal(line, &ask))
			args := []any{}
			for _, raw := range ask.Args {
				args = append(args, decode(raw))
			}
			result, err := reply(ask.Op, args)
			told := answer{Text: []byte(result)}
			if err != nil {
				told = answer{Error: []byte(err.Error())}
			}
			encoder.Encode(told)
			if in.Buffered() == 0 {
				out.Flush()
			}
		}
		if err != nil {
			out.Flush()
			return
		}
	}
}
