"""A kubelet's side of the CRI: pull an image, run a pod with containers in it, take all of it down, over gRPC."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from harness.stubs import cri_runtime_pb2 as runtime_pb
from harness.stubs.cri_runtime_pb2_grpc import RuntimeServiceStub
from soci_snapshotter.containerd.stubs import cri_images_pb2 as images_pb
from soci_snapshotter.containerd.stubs.cri_images_pb2_grpc import ImageServiceStub

# containerd's namespace for everything that comes by the CRI.
NAMESPACE = "k8s.io"
_SECONDS = 60


@dataclass(frozen=True)
class Pod:
    """A sandbox that runs, with what CreateContainer wants to hear of it again."""

    id: str
    config: images_pb.PodSandboxConfig


class Cri:
    """The CRI's two services at one socket. Errors are grpc.RpcError."""

    def __init__(self, channel: grpc.Channel, images: grpc.Channel) -> None:
        self._images = ImageServiceStub(images)
        self._runtime = RuntimeServiceStub(channel)

    def version(self) -> str:
        """What the runtime calls itself, e.g. `containerd 1.6.20`."""
        found = self._runtime.Version(runtime_pb.VersionRequest(), timeout=_SECONDS)
        return f"{found.runtime_name} {found.runtime_version}"

    def ready(self) -> bool:
        """Whether it takes pods; a pod on the node's network needs no CNI."""
        status = self._runtime.Status(runtime_pb.StatusRequest(), timeout=_SECONDS).status
        return any(each.type == "RuntimeReady" and each.status for each in status.conditions)

    def pull(
        self, image: str, *, user: tuple[str, str] | None = None, annotations: Mapping[str, str] | None = None
    ) -> str:
        """Pull an image as the kubelet does, credentials in the request; returns its reference there."""
        auth = images_pb.AuthConfig(username=user[0], password=user[1]) if user else None
        spec = images_pb.ImageSpec(
            image=image, user_specified_image=image, annotations=dict(annotations or {})
        )
        request = images_pb.PullImageRequest(image=spec, auth=auth, sandbox_config=_sandbox("pulls", None))
        return str(self._images.PullImage(request, timeout=_SECONDS).image_ref)

    def image(self, name: str) -> images_pb.Image | None:
        """What it knows of an image, None for an unknown one."""
        spec = images_pb.ImageSpec(image=name)
        found = self._images.ImageStatus(images_pb.ImageStatusRequest(image=spec), timeout=_SECONDS)
        return found.image if found.HasField("image") else None

    def images(self) -> list[str]:
        """Every tag."""
        listed = self._images.ListImages(images_pb.ListImagesRequest(), timeout=_SECONDS).images
        return [tag for image in listed for tag in image.repo_tags]

    def remove_image(self, name: str) -> None:
        """Remove it; its snapshots go with the next collection, which containerd runs at once."""
        spec = images_pb.ImageSpec(image=name)
        self._images.RemoveImage(images_pb.RemoveImageRequest(image=spec), timeout=_SECONDS)

    def run_pod(self, name: str, logs: Path | None = None, handler: str = "") -> Pod:
        """A sandbox on the node's own network."""
        config = _sandbox(name, logs)
        request = runtime_pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return Pod(self._runtime.RunPodSandbox(request, timeout=_SECONDS).pod_sandbox_id, config)

    def stop_pod(self, pod: Pod) -> None:
        """Stop the sandbox and what runs in it, and remove it."""
        identity = pod.id
        self._runtime.StopPodSandbox(
            runtime_pb.StopPodSandboxRequest(pod_sandbox_id=identity), timeout=_SECONDS
        )
        self._runtime.RemovePodSandbox(
            runtime_pb.RemovePodSandboxRequest(pod_sandbox_id=identity), timeout=_SECONDS
        )

    def start(self, pod: Pod, name: str, image: str, command: Sequence[str]) -> str:
        """Create and start a container; its id. Its output goes to <pod's logs>/<name>.log."""
        nodes = images_pb.NamespaceOption(network=images_pb.NODE)
        config = runtime_pb.ContainerConfig(
            metadata=runtime_pb.ContainerMetadata(name=name),
            image=images_pb.ImageSpec(image=image),
            command=command,
            log_path=f"{name}.log",
            linux=runtime_pb.LinuxContainerConfig(
                security_context=runtime_pb.LinuxContainerSecurityContext(namespace_options=nodes)
            ),
        )
        request = runtime_pb.CreateContainerRequest(
            pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
        )
        identity = str(self._runtime.CreateContainer(request, timeout=_SECONDS).container_id)
        self._runtime.StartContainer(
            runtime_pb.StartContainerRequest(container_id=identity), timeout=_SECONDS
        )
        return identity

    def state(self, container: str) -> tuple[str, int]:
        """`CONTAINER_RUNNING`, `CONTAINER_EXITED` ..., and the exit code."""
        request = runtime_pb.ContainerStatusRequest(container_id=container)
        status = self._runtime.ContainerStatus(request, timeout=_SECONDS).status
        return runtime_pb.ContainerState.Name(status.state), status.exit_code

    def run(self, container: str, *command: str) -> tuple[bytes, int]:
        """Run a program in a container that runs: its output, and its exit code."""
        request = runtime_pb.ExecSyncRequest(container_id=container, cmd=command, timeout=_SECONDS)
        done = self._runtime.ExecSync(request, timeout=_SECONDS + 10)
        return done.stdout + done.stderr, done.exit_code

    def remove(self, container: str) -> None:
        """Stop it at once, and remove it; again while it still counts as running, as the kubelet does."""
        end = time.monotonic() + _SECONDS
        while True:
            self._runtime.StopContainer(
                runtime_pb.StopContainerRequest(container_id=container, timeout=0), timeout=_SECONDS
            )
            try:
                self._runtime.RemoveContainer(
                    runtime_pb.RemoveContainerRequest(container_id=container), timeout=_SECONDS
                )
            except grpc.RpcError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
            else:
                return

    def stop_all(self) -> None:
        """Every pod goes: what a test that failed left."""
        listed = self._runtime.ListPodSandbox(runtime_pb.ListPodSandboxRequest(), timeout=_SECONDS).items
        for pod in listed:
            with suppress(grpc.RpcError):
                self.stop_pod(Pod(pod.id, images_pb.PodSandboxConfig()))


@contextmanager
def connect(address: str, images: str | None = None) -> Iterator[Cri]:
    """The services at a socket; `images`: another socket for the ImageService, as the kubelet can have.

    Pods that are left when the block ends are stopped.
    """
    with (
        grpc.insecure_channel(f"unix:{address}") as channel,
        grpc.insecure_channel(f"unix:{images or address}") as images_channel,
    ):
        cri = Cri(channel, images_channel)
        try:
            yield cri
        finally:
            with suppress(grpc.RpcError):
                cri.stop_all()


def _sandbox(name: str, logs: Path | None) -> images_pb.PodSandboxConfig:
    nodes = images_pb.NamespaceOption(network=images_pb.NODE)
    metadata = images_pb.PodSandboxMetadata(name=name, uid=os.urandom(8).hex(), namespace="tests")
    return images_pb.PodSandboxConfig(
        metadata=metadata,
        log_directory=str(logs) if logs is not None else "",
        linux=images_pb.LinuxPodSandboxConfig(
            security_context=images_pb.LinuxSandboxSecurityContext(namespace_options=nodes)
        ),
    )
