// An OCI 1.1 registry with the referrers API on a loopback port: ociregistry ADDRESS BLOB_DIRECTORY.
package main

import (
	"log"
	"net/http"
	"os"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	blobs := registry.WithBlobHandler(registry.NewDiskBlobHandler(os.Args[2]))
	log.Fatal(http.ListenAndServe(os.Args[1], registry.New(registry.WithReferrersSupport(true), blobs)))
}
