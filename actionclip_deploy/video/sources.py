"""How sources of frames are written down: cameras, addresses, screens, files and pipes.

An address can hold secrets. They are here to open it with, and `Source.mask` keeps them out of
whatever is shown.
"""

from __future__ import annotations

import glob
import os
import re
import socket
import ssl
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from actionclip_deploy.errors import VideoError
from actionclip_deploy.video.reader import FILE_FORMATS, decoder_pixels, list_videos

Kind = Literal[
    "camera", "rtsp", "http", "rtmp", "udp", "rtp", "tcp", "screen", "test", "file", "pipe"
]

_SCHEMES: dict[str, Kind] = {
    "rtsp": "rtsp",
    "rtsps": "rtsp",
    "http": "http",
    "https": "http",
    "rtmp": "rtmp",
    "rtmps": "rtmp",
    "udp": "udp",
    "rtp": "rtp",
    "tcp": "tcp",
}
# Those with TLS, and their ports.
_SECURE_PORTS = {"https": 443, "rtsps": 322, "rtmps": 443}
# Whom this machine trusts: where Debian, Red Hat, SUSE and Alpine have it. The FFmpeg that PyAV
# comes with looks at a place of the machine that it was built on.
_TRUSTED = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
UNVERIFIED_HOSTS = "ACTIONCLIP_UNVERIFIED_HOSTS"
# Known to FFmpeg, and not in the builds that PyAV comes with.
_NOT_BUILT = frozenset(
    {"srt", "rist", "s3", "sftp", "smb", "ndi", "zmq", "amqp", "rtmpe", "rtmpte"}
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CAMERA = re.compile(r"(?:/dev/video)?(\d{1,3})(?:\?(.*))?")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_OPTIONS: dict[str, dict[str, re.Pattern[str]]] = {
    "camera": {
        "size": re.compile(r"\d+x\d+"),
        "fps": re.compile(r"\d+(\.\d+)?"),
        "format": re.compile(r"\w+"),
    },
    "screen": {
        "size": re.compile(r"\d+x\d+"),
        "fps": re.compile(r"\d+(\.\d+)?"),
        "at": re.compile(r"\d+,\d+"),
    },
    "test": {"fps": re.compile(r"\d+(\.\d+)?")},
}

# What an address carries after its question mark and nobody has to hide.
_HARMLESS = frozenset(
    {"channel", "subtype", "stream", "profile", "resolution", "size", "fps", "format", "at"}
    | {"udp", "tcp", "multicast", "listen", "pkt_size", "fifo_size", "buffer_size", "ttl"}
    | {"localport", "localaddr", "overrun_nonfatal", "reuse", "transportmode", "unicast"}
)
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"]*@")
_QUERY = re.compile(r"([?&;])([^=&;\s'\"#?]+)(=[^&;\s'\"#]*)?")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
_MASK = "***"
# Shorter values from the environment would be found in words of any message.
_MIN_SECRET_LETTERS = 3

# What a connection may open. No playlist and no redirection may have a local file read.
_PROTOCOLS = {
    "rtsp": "rtp,srtp,udp,tcp,tls",
    "http": "http,https,httpproxy,tcp,tls,crypto",
    "rtmp": "rtmp,rtmps,tcp,tls",
    "udp": "udp",
    "rtp": "rtp,udp",
    "tcp": "tcp",
}
_FORMATS = {
    "rtsp": "rtsp,rtp,sdp,asf,mpegts",
    "rtp": "rtp,sdp,mpegts",
    "http": ",".join(sorted({"hls", *FILE_FORMATS})),
}
FORMATS_OF_FILES = ",".join(sorted(FILE_FORMATS))
# Of a source's first seconds, what tells the codec and the rate; FFmpeg would take 5 of them.
_ANALYZE_SECONDS = 1.0
_SCREEN_FPS = 15.0
_DEVICE_OPTIONS = (("size", "video_size"), ("fps", "framerate"), ("format", "input_format"))


@dataclass(frozen=True)
class Source:
    """Where frames come from.

    Attributes:
        name: What the user calls it.
        kind: Of which kind it is.
        address: What is opened, with its secrets; never to be shown.
        shown: What may be shown of the address in logs, events and metrics.
        is_live: Whether it is opened again when it ends; False for a file and a pipe.
        secrets: What messages must not contain, in every spelling.
    """

    name: str
    kind: Kind
    address: str = field(repr=False)
    shown: str
    is_live: bool
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def mask(self, text: str) -> str:
        """Hide the secrets of this source in a message, and those of any address in it."""
        for secret in self.secrets:
            text = text.replace(secret, _MASK)
        return mask_addresses(text)


def mask_addresses(text: str) -> str:
    """Hide users, passwords and the values of queries in the addresses of a text."""
    return _ADDRESS.sub(lambda found: _mask_address(found[0]), text)


def _mask_address(address: str) -> str:
    address = _USER.sub(rf"\1{_MASK}@", address)
    place, mark, query = address.partition("?")
    return place + _QUERY.sub(_mask_parameter, mark + query)


def _mask_parameter(found: re.Match[str]) -> str:
    separator, name, value = found.groups()
    if name.lower() in _HARMLESS:
        return found[0]
    return f"{separator}{name}={_MASK}" if value is not None else f"{separator}{_MASK}"


def parse_source(
    text: str, *, name: str | None = None, environ: Mapping[str, str] = os.environ
) -> Source:
    """Read what a user writes for a source of frames.

    Args:
        text: The number of a camera or its device (`0`, `/dev/video0`, with options as in
            `0?size=1280x720&fps=15&format=mjpeg`); an address of rtsp, rtsps, http, https (MJPEG,
            HLS), rtmp, rtmps, udp, rtp or tcp; `screen` (`screen?size=640x480&at=100,50&fps=10`);
            `test:` or `test:clock` (`test:?fps=25`); `-` for a pipe; or the path of a file.
            `${NAME}` is taken from the environment and is a secret.
        name: What to call it; by default what may be shown of the address, in short.
        environ: Where variables are looked up.

    Raises:
        ValueError: If it is of no such form, or a variable is not set.
        VideoError: If it is of a protocol that cannot be read here, or there is no such file.
    """
    whole = _VARIABLE.fullmatch(text)
    if whole:
        text = _lookup(whole[1], environ, "source")
    text, secrets = with_variables(text, environ)
    if not text.strip():
        raise ValueError(
            "The source is empty; give a camera's number, an address or the path of a file."
        )
    scheme = _SCHEME.match(text)
    kind: Kind
    if scheme:
        kind = _kind_of_scheme(scheme[1].lower(), text, secrets)
        text = scheme[1].lower() + text[scheme.end(1) :]
        secrets = tuple(dict.fromkeys([*secrets, *_secrets_in(text)]))
    elif text == "-":
        kind = "pipe"
    elif _CAMERA.fullmatch(text):
        kind = "camera"
        text = text if text.startswith("/") else f"/dev/video{text}"
        _check_options(kind, text)
    elif re.match(r"screen(\?|$)", text):
        kind = "screen"
        _check_options(kind, text)
    elif text.startswith("test:"):
        kind = "test"
        if text.partition("?")[0] not in ("test:", "test:clock"):
            raise ValueError(f"{text!r} is not a test source; give test: or test:clock.")
        _check_options(kind, text)
    elif text.lower().startswith("file:"):
        raise ValueError(f"{text!r} is an address of a file; give its path.")
    else:
        kind = _kind_of_path(Path(text))
    by_length = tuple(sorted(secrets, key=len, reverse=True))
    unnamed = Source("", kind, text, "", kind not in ("file", "pipe"), by_length)
    shown = unnamed.mask(text) if kind != "file" else text
    return Source(name or _short(kind, shown), kind, text, shown, unnamed.is_live, by_length)


def _lookup(variable: str, environ: Mapping[str, str], what: str) -> str:
    value = environ.get(variable)
    if not value:
        raise ValueError(
            f"The {what} needs the environment variable {variable}, which is not set; set it, or "
            "write the address without it."
        )
    return value


def with_variables(
    text: str, environ: Mapping[str, str], *, what: str = "source"
) -> tuple[str, tuple[str, ...]]:
    """Fill in `${NAME}` from the environment; gives the text and what in it is secret.

    Args:
        text: An address, or another text that a user wrote.
        environ: Of the variables.
        what: What the text is of, for the error.

    Raises:
        ValueError: If a variable is not set.
    """
    secrets: list[str] = []
    scheme = _SCHEME.match(text)
    user_end = text.rfind("@") if scheme else -1
    query_start = text.find("?") if scheme else -1

    def fill(found: re.Match[str]) -> str:
        value = _lookup(found[1], environ, what)
        # A password may have any letters, which between user and host, and in a query, have to
        # be written in percent; FFmpeg turns them back.
        is_quoted = found.start() < user_end or 0 <= query_start < found.start()
        quoted = quote(value, safe="") if is_quoted else value
        secrets.extend({value, quoted})
        return quoted

    filled = _VARIABLE.sub(fill, text)
    return filled, tuple(s for s in secrets if len(s) >= _MIN_SECRET_LETTERS)


def _secrets_in(address: str) -> Iterator[str]:
    """Passwords and values of the query, as they are written and as they are meant."""
    authority = address.partition("://")[2]
    user, has_user, _ = authority.rpartition("@")
    found = [user, user.partition(":")[2]] if has_user else []
    pairs = parse_qsl(address.partition("?")[2])
    found += [value for name, value in pairs if name.lower() not in _HARMLESS]
    for secret in found:
        for spelling in (secret, unquote(secret), quote(secret, safe="")):
            if len(spelling) >= _MIN_SECRET_LETTERS:
                yield spelling


def _kind_of_scheme(scheme: str, text: str, secrets: tuple[str, ...]) -> Kind:
    shown = Source("", "http", text, "", True, secrets).mask(text)
    if scheme in _SCHEMES:
        if not text[len(scheme) + 3 :].strip("/"):
            raise ValueError(f"{shown!r} names no host; give it as {scheme}://HOST/PATH.")
        return _SCHEMES[scheme]
    if scheme in _NOT_BUILT:
        raise VideoError(
            f"{shown} cannot be read: PyAV comes with an FFmpeg that has no {scheme}. Have ffmpeg, "
            "or a media server such as MediaMTX, give it on as RTSP, and give that address."
        )
    if scheme == "file":
        raise ValueError(f"{shown!r} is an address of a file; give its path.")
    raise ValueError(
        f"{shown!r} is of the protocol {scheme}; expected one of {', '.join(sorted(_SCHEMES))}."
    )


def _kind_of_path(path: Path) -> Kind:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as exc:  # ValueError: a name with a zero in it
        if str(path).startswith("/dev/"):
            return "camera"  # by a name that comes with the device
        raise VideoError(
            f"There is no file {path}; give the path of a file, an address such as "
            "rtsp://HOST/PATH, or a camera's number."
        ) from exc
    if stat.S_ISDIR(mode):
        raise VideoError(f"{path} is a folder; give the files in it, by a pattern for instance.")
    if stat.S_ISFIFO(mode):
        return "pipe"
    return "camera" if stat.S_ISCHR(mode) else "file"


def options_of(text: str) -> dict[str, str]:
    """The options of a camera, a screen or a test source."""
    return dict(parse_qsl(text.partition("?")[2], keep_blank_values=True))


def _check_options(kind: str, text: str) -> None:
    allowed = _OPTIONS[kind]
    for option, value in options_of(text).items():
        if option not in allowed or not allowed[option].fullmatch(value):
            raise ValueError(
                f"{option}={value} is not an option of the source {text!r}; expected "
                f"{', '.join(sorted(allowed))}, as in size=640x480, fps=10, at=100,50."
            )


def _short(kind: Kind, shown: str) -> str:
    if kind == "pipe":
        return "pipe" if shown == "-" else shown
    if kind in ("file", "screen"):
        return shown.partition("?")[0] if kind == "screen" else shown
    if kind == "test":
        return "test"
    if kind == "camera":
        return shown.partition("?")[0].rpartition("/")[2]
    return shown.partition("://")[2].partition("?")[0].removeprefix(f"{_MASK}@").rstrip("/")


def expand_sources(
    texts: Iterable[str], *, environ: Mapping[str, str] = os.environ
) -> list[Source]:
    """Read several sources; a pattern such as `videos/*.mp4` or a folder stands for its files.

    Raises:
        ValueError: If one is of no form that a source has.
        VideoError: If one cannot be read here, or a pattern or folder has no video.
    """
    sources = []
    for text in texts:
        # The options of a device begin with a question mark, which in a path is a pattern.
        is_device = _CAMERA.fullmatch(text) or re.match(r"screen(\?|$)|test:", text)
        is_path = not (_SCHEME.match(text) or _VARIABLE.fullmatch(text) or is_device)
        if is_path and Path(text).is_dir():
            paths = list_videos(Path(text), recursive=False)
        elif is_path and glob.has_magic(text) and not os.path.lexists(text):
            # Not Path.glob, which takes no pattern that begins with a slash.
            found = sorted(glob.glob(text, recursive=True))  # noqa: PTH207
            paths = [Path(path) for path in found if not Path(path).is_dir()]
        else:
            sources.append(parse_source(text, environ=environ))
            continue
        if not paths:
            raise VideoError(f"No video is at {text}; give a pattern or a folder that has some.")
        sources += [parse_source(str(path), environ=environ) for path in paths]
    return sources


def ffmpeg_arguments(
    source: Source, *, max_pixels: int, timeout_seconds: float
) -> tuple[str, str | None, dict[str, str]]:
    """What FFmpeg is to open of a live source, as which format, and with which options.

    Args:
        source: Neither a file, nor a pipe, nor a test.
        max_pixels: Of a frame.
        timeout_seconds: How long the network may be silent.
    """
    kind, address = source.kind, source.address
    pixels = {"max_pixels": decoder_pixels(max_pixels)}
    if kind in ("camera", "screen"):
        given = options_of(address)
        options = pixels | {key: given[name] for name, key in _DEVICE_OPTIONS if name in given}
        if kind == "camera":
            return address.partition("?")[0], "video4linux2,v4l2", options
        options.setdefault("framerate", f"{_SCREEN_FPS:g}")
        corner = f"+{given['at']}" if "at" in given else ""
        return os.environ.get("DISPLAY", ":0") + corner, "x11grab", options
    microseconds = str(round(timeout_seconds * 1e6))
    options = pixels | {
        "analyzeduration": str(round(_ANALYZE_SECONDS * 1e6)),
        "format_whitelist": _FORMATS.get(kind, FORMATS_OF_FILES),
        "protocol_whitelist": _PROTOCOLS[kind],
    }
    options |= _tls_options(address)
    if kind == "rtsp":
        options |= {"rtsp_transport": "tcp", "timeout": microseconds}
        return address, "rtsp", options
    # RTMP would take `timeout` for a wish to listen, in seconds.
    options["rw_timeout"] = microseconds
    if kind != "rtmp":
        options["timeout"] = microseconds
    if kind == "udp":
        options["overrun_nonfatal"] = "1"
    return address, None, options


def certificate_problem(address: str, timeout_seconds: float) -> str | None:
    """Why the certificate of the other side is refused, in words; None if that is not so.

    FFmpeg says so in its log alone, which is that of all threads.
    """
    parts = urlsplit(address)
    port = parts.port or _SECURE_PORTS.get(parts.scheme.lower())
    if not parts.hostname or port is None or not _is_verified(parts.hostname):
        return None
    given = os.environ.get("SSL_CERT_FILE")
    try:
        context = ssl.create_default_context(cafile=_trusted_certificates())
    except OSError as exc:
        return None if not given else f"the file in SSL_CERT_FILE cannot be read: {exc.strerror}"
    place = (parts.hostname, port)
    try:
        with (
            socket.create_connection(place, timeout_seconds) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname),
        ):
            return None
    except ssl.SSLCertVerificationError as exc:
        return exc.verify_message.rstrip(".")
    except OSError:
        return None


def _tls_options(address: str) -> dict[str, str]:
    """Have certificates checked, which FFmpeg leaves out unless it is asked."""
    parts = urlsplit(address)
    if parts.scheme.lower() not in (*_SECURE_PORTS, "http"):  # which may lead to https
        return {}
    if not _is_verified(parts.hostname or ""):
        return {"tls_verify": "0"}
    trusted = _trusted_certificates()
    return {"tls_verify": "1", **({} if trusted is None else {"ca_file": trusted})}


def _is_verified(host: str) -> bool:
    names = os.environ.get(UNVERIFIED_HOSTS, "").lower().split()
    return host.lower() not in names


def _trusted_certificates() -> str | None:
    """The file of the certificates that are trusted."""
    given = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    return given or next((path for path in _TRUSTED if os.path.isfile(path)), None)  # noqa: PTH113
