"""What a video is made from beside text: a first and a last image, or a video, each checked and cut to its size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ..errors import RequestError
from .media.image import MAX_PIXELS, MIN_SIDE, fingerprint, fit_image, read_image, size_for
from .windows import own_frames

if TYPE_CHECKING:
    from .facts import ModelFacts

STRENGTH = 0.8
"""How much of a given video may change; the pipeline's own default."""


class Sources(NamedTuple):
    """What a video is made from, in RGB; `video` has its size and number of frames, images have theirs once `cut`."""

    image: Image.Image | None = None
    last_image: Image.Image | None = None
    video: list[Image.Image] | None = None

    def cut(self, width: int, height: int) -> Sources:
        """The same with images of the video's size."""
        first, last = (
            None if image is None else fit_image(image, width, height) for image in (self.image, self.last_image)
        )
        return Sources(first, last, self.video)

    @property
    def fingerprints(self) -> dict[str, Any]:
        """What tells them from others, by name."""
        video = None
        if self.video is not None:
            video = hashlib.sha256("".join(map(fingerprint, self.video)).encode()).hexdigest()
        images = {name: getattr(self, name) for name in ("image", "last_image")}
        return {name: None if value is None else fingerprint(value) for name, value in images.items()} | {
            "video": video
        }


def check_kinds(given: Mapping[str, Any]) -> None:
    """Refuse what is neither a file nor a picture, or several for a video; RequestError."""
    for name in ("image", "last_image"):
        value = given[name]
        if value is not None and not (isinstance(value, str | os.PathLike | Image.Image) and value):
            raise RequestError(f"{name} must be the path of a file or a Pillow image, not {value!r:.80}")
    video = given["video"]
    pictures = isinstance(video, list) and all(isinstance(frame, Image.Image) for frame in video)
    if video is not None and not (video and (pictures or isinstance(video, str | os.PathLike))):
        raise RequestError(f"video must be the path of a file or a list of Pillow images, not {video!r:.80}")


def check_sources(given: Mapping[str, Any], facts: ModelFacts) -> None:
    """Refuse what the model cannot begin with, and the lack of what it needs.

    Raises:
        RequestError: likewise.
    """
    image, last, video = (given[name] is not None for name in ("image", "last_image", "video"))
    if image and facts.image == "none":
        raise RequestError(f"model {facts.name!r} makes videos from text alone; leave out the image")
    if not image and facts.image == "required":
        raise RequestError(f"model {facts.name!r} makes videos from an image; give one (--image FILE)")
    if last and facts.last_image == "none":
        raise RequestError(f"model {facts.name!r} takes no image to end with; leave out last_image")
    if last and not image:
        raise RequestError("last_image is for videos that start from an image; give that too (--image FILE)")
    if image and not last and facts.last_image == "required":
        raise RequestError(
            f"model {facts.name!r} needs two images, the first and the last frame; give both (--last-image FILE)"
        )
    if video and facts.video == "none":
        raise RequestError(f"model {facts.name!r} takes no video; leave it out")
    if video and image:
        raise RequestError("a video is made from an image or from a video, not from both; leave out one of them")
    if given["strength"] is not None and not (video and facts.video == "changed"):
        raise RequestError("strength says how much of a video changes, for models that change one; leave it out")


def read_sources(
    given: Mapping[str, Any], filled: dict[str, Any], facts: ModelFacts, *, sized: bool
) -> tuple[Sources, dict[str, Any]]:
    """Read what a video is made from.

    Args:
        given: fields of the request, as the user gave them.
        filled: the same with the model's defaults.
        facts: of the model.
        sized: whether the user said the size; else it follows the first picture.

    Returns:
        What was read, and `filled` with size, number of frames, and strength.

    Raises:
        RequestError: a file cannot be read, or the video is shorter than what is asked for.
    """
    filled = dict(filled)
    image = None if given["image"] is None else read_image(given["image"])
    last = None if given["last_image"] is None else read_image(given["last_image"])
    first = image if image is not None or given["video"] is None else next(_pictures(given["video"], None))
    if first is not None and not sized:
        area = facts.defaults.width * facts.defaults.height
        filled["width"], filled["height"] = size_for(first, area, facts.size_step)
    size = filled["width"], filled["height"]
    video = None
    if given["video"] is not None:
        asked = given["num_frames"] is not None or given["seconds"] is not None
        most = filled["num_frames"] if asked else own_frames(facts, filled["fps"])
        video = []
        for picture in _pictures(given["video"], filled["fps"]):
            video.append(fit_image(picture, *size))
            if len(video) == most:
                break
        if asked and len(video) < most:
            raise RequestError(
                f"the video has {len(video)} frames at {filled['fps']} per second, but {most} are asked for; ask for "
                "fewer, or leave their number out"
            )
        filled["num_frames"] = (len(video) - 1) // facts.frame_step * facts.frame_step + 1
        video = video[: filled["num_frames"]] if not asked else video
        if facts.video == "changed" and given["strength"] is None:
            filled["strength"] = STRENGTH
    return Sources(image, last, video), filled


def _pictures(source: str | os.PathLike[str] | Sequence[Image.Image], fps: int | None) -> Iterator[Image.Image]:
    """The frames of a file that are seen at so many times a second, all of them if that is None; at least one.

    Raises:
        RequestError: it is not there, or no video.
    """
    if not isinstance(source, str | os.PathLike):
        yield from source
        return
    import av  # FFmpeg takes a while to load, and most requests have no video

    name = f"video {str(source)!r:.90}"
    try:
        with av.open(os.path.expanduser(source)) as container:
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
                raise RequestError(
                    f"{name} has {width}x{height} pixels; each side needs at least {MIN_SIDE}, and all at most "
                    f"{MAX_PIXELS // 10**6} million"
                )
            shown, time, picture, begins = 0, 0.0, None, None
            for frame in container.decode(stream):
                time = float(frame.time or 0.0)
                begins = time if begins is None else begins
                # A frame is seen until the next one comes.
                while picture is not None and fps is not None and shown / fps < time - begins - _MOMENT:
                    yield picture
                    shown += 1
                picture = frame.to_image()
                if fps is None:
                    yield picture
            if picture is None or begins is None:
                raise RequestError(f"{name} has no frames")
            ends = time + 1.0 / float(stream.average_rate or 1.0)
            while fps is not None and (shown == 0 or shown / fps < ends - begins - _MOMENT):
                yield picture
                shown += 1
    except (OSError, IndexError, ValueError) as error:  # av's errors are OSErrors and ValueErrors
        said = getattr(error, "strerror", None) or "it is no video"
        raise RequestError(f"{name} cannot be read ({said}); name a video file, such as an mp4") from error


_MOMENT = 1e-3
"""Times in files are rounded to their own clock."""
