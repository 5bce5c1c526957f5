// What tests need of Go's own libraries, standard input to standard output:
//
//	gotools gzip LEVEL      compress/gzip, as most Go image builders write layers
//	gotools pgzip LEVEL     klauspost/pgzip, as buildah, podman and skopeo do
//	gotools estargz CHUNK   the stargz-snapshotter's own writer
//	gotools tarlist         archive/tar, containerd's reader: one line of JSON for each entry
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"log"
	"os"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/pgzip"
)

func main() {
	log.SetFlags(0)
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		log.Fatal(err)
	}
}

func run(verb string, args []string) error {
	number := 0
	if len(args) > 0 {
		var err error
		if number, err = strconv.Atoi(args[0]); err != nil {
			return err
		}
	}
	switch verb {
	case "gzip":
		out, err := gzip.NewWriterLevel(os.Stdout, number)
		return pipe(out, err)
	case "pgzip":
		out, err := pgzip.NewWriterLevel(os.Stdout, number)
		if err == nil {
			err = out.SetConcurrency(256<<10, 2)
		}
		return pipe(out, err)
	case "estargz":
		return stargz(number)
	case "tarlist":
		return list()
	}
	log.Fatalf("unknown verb %q", verb)
	return nil
}

func pipe(out io.WriteCloser, err error) error {
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, os.Stdin); err != nil {
		return err
	}
	return out.Close()
}

func stargz(chunk int) error {
	data, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	section := io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data)))
	blob, err := estargz.Build(section, estargz.WithChunkSize(chunk))
	if err != nil {
		return err
	}
	defer blob.Close()
	_, err = io.Copy(os.Stdout, blob)
	return err
}

// plain hides Seek, with which archive/tar would step over data that is not there.
type plain struct{ data *bytes.Reader }

func (p plain) Read(b []byte) (int, error) { return p.data.Read(b) }

func list() error {
	data, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	in := plain{bytes.NewReader(data)}
	reader, out := tar.NewReader(in), json.NewEncoder(os.Stdout)
	for {
		header, err := reader.Next()
		if err == io.EOF {
			return out.Encode(map[string]any{"end": len(data) - in.data.Len()})
		}
		if err != nil {
			return out.Encode(map[string]any{"error": err.Error()})
		}
		records := [][2][]byte{}
		for key, value := range header.PAXRecords {
			records = append(records, [2][]byte{[]byte(key), []byte(value)})
		}
		if err := out.Encode(map[string]any{
			"name": []byte(header.Name), "link": []byte(header.Linkname), "type": int(header.Typeflag),
			"offset": len(data) - in.data.Len(), "size": header.Size, "mode": header.Mode,
			"uid": uint32(header.Uid), "gid": uint32(header.Gid),
			"uname": []byte(header.Uname), "gname": []byte(header.Gname),
			"seconds": header.ModTime.Unix(), "nanoseconds": header.ModTime.Nanosecond(),
			"major": header.Devmajor, "minor": header.Devminor, "records": records,
		}); err != nil {
			return err
		}
	}
}
