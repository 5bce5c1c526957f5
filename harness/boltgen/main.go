// boltgen writes bbolt files for the tests.
//
//	boltgen vectors DIR     the samples of tests/vectors/bbolt: <name>.db and, as bbolt reads it, <name>.json
//	boltgen snapshots FILE  a snapshotter's metadata.db with the rows that stdin lists as JSON, through containerd's own store
//	boltgen list FILE       the rows of such a file as JSON, through containerd's own store
package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"
)

// Bucket is a bucket as the tests compare it: keys and values in hex.
type Bucket struct {
	Sequence uint64             `json:"sequence"`
	Values   map[string]string  `json:"values"`
	Buckets  map[string]*Bucket `json:"buckets"`
}

// Row is one snapshot. Rows are made in order; a committed one from an active one with the key "making-<name>".
type Row struct {
	ID     string            `json:"id"`
	Key    string            `json:"key"`
	Parent string            `json:"parent"`
	Kind   string            `json:"kind"`
	Labels map[string]string `json:"labels"`
	Size   int64             `json:"size"`
	Inodes int64             `json:"inodes"`
	// Created and Updated are nanoseconds since 1970; written by list only.
	Created int64 `json:"created"`
	Updated int64 `json:"updated"`
	// At, where it is not "0" or "", is the id the row must get: rows in between are made and removed.
	At string `json:"at"`
}

func main() {
	if len(os.Args) != 3 {
		fail(fmt.Errorf("usage: boltgen vectors|snapshots|list PATH"))
	}
	switch os.Args[1] {
	case "vectors":
		vectors(os.Args[2])
	case "snapshots":
		var rows []Row
		check(json.NewDecoder(os.Stdin).Decode(&rows))
		writeRows(os.Args[2], rows)
	case "list":
		check(json.NewEncoder(os.Stdout).Encode(listRows(os.Args[2])))
	default:
		fail(fmt.Errorf("unknown command %q", os.Args[1]))
	}
}

func vectors(dir string) {
	make := func(name string, options bolt.Options, transactions ...func(*bolt.Tx) error) string {
		path := filepath.Join(dir, name+".db")
		_ = os.Remove(path)
		db, err := bolt.Open(path, 0o600, &options)
		check(err)
		for _, transaction := range transactions {
			check(db.Update(transaction))
		}
		check(db.Close())
		dump(path, filepath.Join(dir, name+".json"))
		return path
	}
	make("empty", bolt.Options{})
	make("inline", bolt.Options{}, func(tx *bolt.Tx) error {
		bucket, err := tx.CreateBucket([]byte("one"))
		check(err)
		check(bucket.SetSequence(7))
		check(bucket.Put([]byte("key"), []byte("value")))
		check(bucket.Put([]byte{0, 0xff}, nil))
		_, err = tx.CreateBucket([]byte("empty"))
		return err
	})
	make("nested", bolt.Options{PageSize: 1024}, nested)
	// Entries of several pages, and trees of three levels.
	make("overflow", bolt.Options{PageSize: 1024}, overflow)
	make("freelist", bolt.Options{PageSize: 1024}, overflow, removeMost)
	make("no-freelist", bolt.Options{PageSize: 1024, NoFreelistSync: true}, overflow, removeMost)
	torn(dir)
	rows := filepath.Join(dir, "snapshots.db")
	_ = os.Remove(rows)
	writeRows(rows, sample())
	dump(rows, filepath.Join(dir, "snapshots.json"))
	save(filepath.Join(dir, "snapshots.rows.json"), listRows(rows))
}

func nested(tx *bolt.Tx) error {
	bucket, err := tx.CreateBucket([]byte("a"))
	check(err)
	for depth := range 6 {
		check(bucket.SetSequence(uint64(depth) << 40))
		for number := range 20 {
			check(bucket.Put(fmt.Appendf(nil, "value-%d", number), fmt.Appendf(nil, "%d-%d", depth, number)))
		}
		bucket, err = bucket.CreateBucket(fmt.Appendf(nil, "inner-%d", depth))
		check(err)
	}
	return nil
}

func overflow(tx *bolt.Tx) error {
	bucket, err := tx.CreateBucket([]byte("many"))
	check(err)
	for number := range 600 {
		check(bucket.Put(fmt.Appendf(nil, "%06d-with-a-key-of-some-length", number), make([]byte, number%50)))
	}
	big, err := tx.CreateBucket([]byte("big"))
	check(err)
	for number := range 4 {
		value := make([]byte, 3000*(number+1))
		for position := range value {
			value[position] = byte(position * (number + 1))
		}
		check(big.Put(fmt.Appendf(nil, "%d", number), value))
	}
	return big.Put(make([]byte, 2500), []byte("under a long key"))
}

func removeMost(tx *bolt.Tx) error {
	bucket := tx.Bucket([]byte("many"))
	for number := range 600 {
		if number%20 != 0 {
			check(bucket.Delete(fmt.Appendf(nil, "%06d-with-a-key-of-some-length", number)))
		}
	}
	return tx.DeleteBucket([]byte("big"))
}

// torn writes files whose last transaction was cut off in its meta page: what is read is the state before it.
func torn(dir string) {
	for _, pageSize := range []int{1024, 4096} {
		path := filepath.Join(dir, fmt.Sprintf("torn-%d.db", pageSize))
		_ = os.Remove(path)
		db, err := bolt.Open(path, 0o600, &bolt.Options{PageSize: pageSize})
		check(err)
		last := 0
		put := func(value string) {
			check(db.Update(func(tx *bolt.Tx) error {
				last = tx.ID()
				bucket, err := tx.CreateBucketIfNotExists([]byte("b"))
				check(err)
				return bucket.Put([]byte("key"), []byte(value))
			}))
		}
		put("before")
		if pageSize == 4096 { // so that of the two files one has page 0 torn, and one page 1
			put("still before")
		}
		dumpOpen(db, filepath.Join(dir, fmt.Sprintf("torn-%d.json", pageSize)))
		put("after")
		check(db.Close())
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		check(err)
		_, err = file.WriteAt(make([]byte, 24), int64(last%2*pageSize)+16+40) // transaction, checksum
		check(err)
		check(file.Close())
	}
}

func sample() []Row {
	remote := func(layer string, target string) map[string]string {
		return map[string]string{
			"containerd.io/snapshot.ref":                          target,
			"containerd.io/snapshot/cri.image-ref":                "registry.example/x:1",
			"containerd.io/snapshot/cri.layer-digest":             layer,
			"containerd.io/snapshot/remote":                       "remote snapshot",
			"containerd.io/snapshot/remote/namespace":             "default",
			"containerd.io/snapshot/remote/soci.index.digest":     digest(9),
			"containerd.io/snapshot/cri.manifest-digest":          digest(8),
			"containerd.io/snapshot/remote/soci.size":             "1234",
			"containerd.io/snapshot/remote/image.layers.size":     "",
			"containerd.io/snapshot/remote/has.soci.index.digest": "true",
		}
	}
	return []Row{
		{Key: digest(1), Kind: "committed", Labels: remote(digest(101), digest(1)), At: "3"},
		{Key: digest(2), Parent: digest(1), Kind: "committed", Labels: remote(digest(102), digest(2))},
		{Key: "default/7/" + digest(3), Parent: digest(2), Kind: "committed", Size: 1 << 33, Inodes: 4711},
		{Key: "default/9/container", Parent: "default/7/" + digest(3), Kind: "active", Labels: map[string]string{"a": "b"}},
		{Key: "k8s.io/11/view", Parent: digest(1), Kind: "view", At: "200"},
	}
}

func digest(number int) string { return fmt.Sprintf("sha256:%064x", number) }

func writeRows(path string, rows []Row) {
	store, err := storage.NewMetaStore(path)
	check(err)
	last := uint64(0)
	within := func(work func(context.Context) error) {
		check(store.WithTransaction(context.Background(), true, work))
	}
	for _, row := range rows {
		at, _ := strconv.ParseUint(row.At, 10, 64)
		for last+1 < at {
			last++
			within(func(ctx context.Context) error {
				_, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "gap", "")
				check(err)
				_, _, err = storage.Remove(ctx, "gap")
				return err
			})
		}
		last++
		within(func(ctx context.Context) error {
			labels := snapshots.WithLabels(row.Labels)
			kind, key := snapshots.KindActive, row.Key
			if row.Kind == "view" {
				kind = snapshots.KindView
			}
			if row.Kind == "committed" {
				key = "making-" + row.Key
			}
			made, err := storage.CreateSnapshot(ctx, kind, key, row.Parent, labels)
			check(err)
			if row.At != "" && row.At != "0" && made.ID != row.At {
				fail(fmt.Errorf("row %q has id %s, not %s", row.Key, made.ID, row.At))
			}
			if row.Kind == "committed" {
				usage := snapshots.Usage{Size: row.Size, Inodes: row.Inodes}
				_, err = storage.CommitActive(ctx, key, row.Key, usage, labels)
			}
			return err
		})
	}
	check(store.Close())
}

func listRows(path string) []Row {
	store, err := storage.NewMetaStore(path)
	check(err)
	rows := []Row{}
	check(store.WithTransaction(context.Background(), false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			id, _, usage, err := storage.GetInfo(ctx, info.Name)
			check(err)
			rows = append(rows, Row{
				ID: id, Key: info.Name, Parent: info.Parent, Kind: kind(info.Kind), Labels: info.Labels,
				Size: usage.Size, Inodes: usage.Inodes,
				Created: info.Created.UnixNano(), Updated: info.Updated.UnixNano(),
			})
			return nil
		})
	}))
	check(store.Close())
	return rows
}

func kind(kind snapshots.Kind) string {
	return map[snapshots.Kind]string{
		snapshots.KindView: "view", snapshots.KindActive: "active", snapshots.KindCommitted: "committed",
	}[kind]
}

func dump(path, target string) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	check(err)
	dumpOpen(db, target)
	check(db.Close())
}

func dumpOpen(db *bolt.DB, target string) {
	check(db.View(func(tx *bolt.Tx) error {
		save(target, read(tx.Cursor().Bucket()))
		return nil
	}))
}

func read(bucket *bolt.Bucket) *Bucket {
	found := &Bucket{bucket.Sequence(), map[string]string{}, map[string]*Bucket{}}
	check(bucket.ForEach(func(key, value []byte) error {
		name := hex.EncodeToString(key)
		if value == nil {
			found.Buckets[name] = read(bucket.Bucket(key))
		} else {
			found.Values[name] = hex.EncodeToString(value)
		}
		return nil
	}))
	return found
}

func save(path string, value any) {
	file, err := os.Create(path)
	check(err)
	check(json.NewEncoder(file).Encode(value))
	check(file.Close())
}

func check(err error) {
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintf(os.Stderr, "boltgen: %v\n", err)
	os.Exit(1)
}
