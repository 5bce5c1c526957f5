// Package conformance runs containerd's own snapshotter suite against a snapshotter on a unix socket.
//
// SNAPSHOTS_SOCKET names the socket. All tests of the suite share that one server, as they do when containerd
// tests itself through its own socket.
package conformance

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestConformance(t *testing.T) {
	socket := os.Getenv("SNAPSHOTS_SOCKET")
	if socket == "" {
		t.Fatal("SNAPSHOTS_SOCKET is not set")
	}
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	client := snapshotsapi.NewSnapshotsClient(connection)
	// The name makes the suite leave out what no overlayfs can do: renaming a lower directory.
	testsuite.SnapshotterSuite(t, "overlayfs", func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
		return proxy.NewSnapshotter(client, "conformance"), nil, nil
	})
}
