"""containerd's image records: names for content."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.field_mask_pb2 import FieldMask

from ..errors import AlreadyExists, NotFound
from ..formats.oci import Descriptor
from .calls import Caller
from .stubs import images_pb2, images_pb2_grpc
from .types import Image, descriptor_from, descriptor_to, time_from


class Images:
    """The images service. Safe for threads."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = images_pb2_grpc.ImagesStub(caller.channel)

    def get(self, name: str) -> Image:
        """The record of that name; NotFound that says what to do when there is none."""
        try:
            answer = self._caller.unary(
                self._stub.Get, images_pb2.GetImageRequest(name=name), f"image {name}"
            )
        except NotFound:
            raise NotFound(
                f"image {name} is not in containerd's namespace {self._caller.namespace!r}; pull it first, "
                f"or name another --namespace"
            ) from None
        return _image(answer.image)

    def find(self, *filters: str) -> list[Image]:
        """Every record that matches one of the filters (containerd's filter syntax)."""
        answer = self._caller.unary(self._stub.List, images_pb2.ListImagesRequest(filters=filters), "images")
        return [_image(message) for message in answer.images]

    def put(self, name: str, target: Descriptor, labels: Mapping[str, str] | None = None) -> Image:
        """Create the record, or let the existing one point to `target` (its other labels stay)."""
        image = images_pb2.Image(name=name, target=descriptor_to(target), labels=labels or {})
        try:
            request = images_pb2.CreateImageRequest(image=image)
            return _image(self._caller.unary(self._stub.Create, request, f"image {name}").image)
        except AlreadyExists:
            paths = ["target", *(f"labels.{key}" for key in labels or {})]
            update = images_pb2.UpdateImageRequest(image=image, update_mask=FieldMask(paths=paths))
            return _image(self._caller.unary(self._stub.Update, update, f"image {name}").image)

    def delete(self, name: str, *, collect: bool = False) -> None:
        """Remove the record; with `collect`, wait until what only it kept alive is gone."""
        request = images_pb2.DeleteImageRequest(name=name, sync=collect)
        self._caller.unary(self._stub.Delete, request, f"image {name}")


def _image(message: images_pb2.Image) -> Image:
    return Image(
        name=message.name,
        target=descriptor_from(message.target),
        labels=dict(message.labels),
        updated_at=time_from(message.updated_at),
    )
