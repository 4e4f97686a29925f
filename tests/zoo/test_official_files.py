"""Finding, verifying and fetching a data set, on tiny files in its layouts served from this machine."""

import gzip
import hashlib
import http.server
import threading

import pytest

from refluence.errors import DataError
from refluence.zoo import availability as availability_module
from refluence.zoo.availability import availability, fetch_dataset
from refluence.zoo.datasets import dataset_names, source_of
from refluence.zoo.official_files import Download, Layout, OfficialFile, Source, fetch, locate, located, missing
from support.official import put

CONTENTS = {"images": b"pictures " * 5000, "labels": b"names"}
PACKED = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in CONTENTS.items()}
WHOLE = b"both in one"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def source(*mirrors):
    """A set of two files, as they are or gzipped, in two folders; or of one file "whole"."""
    return Source(
        name="toys",
        title="The Toys",
        layouts=(
            Layout(("toys", "Toys/raw"), tuple(OfficialFile(name, sha256(c)) for name, c in CONTENTS.items())),
            Layout(("one",), (OfficialFile("whole", sha256(WHOLE)),)),
        ),
        downloads=tuple(Download(name, sha256(content), len(content), mirrors) for name, content in PACKED.items()),
        folder="toys",
        ways=("Set {data} to a folder with `toys/`.", "Ask for it in `Toys/raw/` of {data}."),
    )


@pytest.fixture
def data(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("folder", ["toys", "Toys/raw"])
@pytest.mark.parametrize(
    "form", [CONTENTS, PACKED, {f"{name}.gz": gzip.compress(c, 1) for name, c in CONTENTS.items()}]
)
def test_every_folder_as_it_is_or_gzipped_by_any_gzip(data, folder, form):
    put(data / folder, form)
    found = locate(source())
    assert found.folder == data / folder
    assert {name: found.read(name) for name in CONTENTS} == CONTENTS


def test_another_layout_is_told_by_the_files_it_holds(data):
    put(data / "one", {"whole": WHOLE})
    found = locate(source())
    assert found.holds("whole")
    assert not found.holds("images")
    assert found.read("whole") == WHOLE


def test_the_users_folder_goes_before_the_cache_whatever_the_layout(data, cache):
    put(cache / "data" / "toys", PACKED)
    assert locate(source()).folder == cache / "data" / "toys"
    put(data / "one", {"whole": WHOLE})
    assert locate(source()).folder == data / "one"


def test_an_absolute_folder_is_one_of_a_system_package(data, tmp_path):
    put(tmp_path / "usr" / "share" / "toys", {"whole": WHOLE})
    layout = Layout((str(tmp_path / "usr" / "share" / "toys"),), (OfficialFile("whole", sha256(WHOLE)),))
    packaged = Source("toys", "The Toys", (layout,), (), "toys", ("", ""))
    assert locate(packaged).folder == tmp_path / "usr" / "share" / "toys"


def test_an_incomplete_folder_is_not_taken(data):
    put(data / "toys", {"images": CONTENTS["images"]})
    assert locate(source()) is None


def test_a_missing_set_names_the_three_ways_and_where_it_was_looked_for(data, cache):
    with pytest.raises(DataError) as caught:
        located(source())
    text = str(caught.value)
    assert "The Toys was not found" in text
    for way in ("1. `refluence data fetch toys`", "2. Set $REFLUENCE_DATA to a folder", "3. Ask for it in `Toys/raw/`"):
        assert way in text
    for folder in (data / "toys", data / "Toys/raw", data / "one", cache / "data" / "toys"):
        assert str(folder) in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("images", b"not it"),
        ("images.gz", gzip.compress(b"not it", mtime=0)),
    ],
)
def test_a_wrong_checksum_names_file_expected_got_and_remedy(data, name, content):
    put(data / "toys", {**CONTENTS, name: content})
    if name != "images":
        (data / "toys" / "images").unlink()
    found = locate(source())
    with pytest.raises(DataError) as caught:
        found.read("images")
    text = str(caught.value)
    for part in (data / "toys" / name, sha256(CONTENTS["images"]), sha256(b"not it"), "refluence data fetch toys"):
        assert str(part) in text
    with pytest.raises(DataError, match="not the published file"):
        found.verify()


@pytest.mark.parametrize("content", [PACKED["images.gz"][:60], b"no gzip at all", b""])
def test_a_damaged_gzip_file(data, content):
    put(data / "toys", {**PACKED, "images.gz": content})
    with pytest.raises(DataError, match=r"images\.gz (cannot be read|is not the published file)"):
        locate(source()).read("images")


class Server:
    """The gzipped files over HTTP; `break_after` cuts connections, `ranges=False` ignores requests for a part."""

    def __init__(self, files, break_after=None, ranges=True):
        self.requests = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name, start = self.path.strip("/"), self.headers["Range"]
                server.requests.append((name, start))
                if name not in files:
                    self.send_error(404)
                    return
                begin = int(start.removeprefix("bytes=").removesuffix("-")) if start and ranges else 0
                content = files[name][begin:]
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:break_after])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(*args, **options):
        servers.append(Server(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_fetch_takes_the_next_mirror_and_keeps_what_is_right(cache, data, serve):
    server = serve(PACKED)
    toys = source(f"{server.address}nowhere/", server.address)
    folder = fetch(toys, progress=False)
    assert folder == cache / "data" / "toys" == locate(toys).folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(PACKED)
    assert locate(toys).verify() == "checksums verified"
    asked = len(server.requests)
    (folder / "labels.gz").write_bytes(b"damaged")
    fetch(toys, progress=False)
    assert [name for name, _ in server.requests[asked:]] == ["nowhere/labels.gz", "labels.gz"]
    assert locate(toys).verify() == "checksums verified"


def test_a_broken_connection_is_opened_again_for_the_rest(cache, data, serve):
    cut = len(PACKED["images.gz"]) // 2
    server = serve(PACKED, break_after=cut)
    fetch(source(server.address), progress=False)
    assert locate(source()).read("images") == CONTENTS["images"]
    assert ("images.gz", f"bytes={cut}-") in server.requests


def test_connections_that_give_nothing_more_end_in_an_error(cache, data, serve):
    server = serve(PACKED, break_after=20, ranges=False)
    with pytest.raises(DataError, match=r"images\.gz could not be downloaded"):
        fetch(source(server.address), progress=False)
    assert [name for name, _ in server.requests] == ["images.gz"] * 6
    assert list((cache / "data" / "toys").iterdir()) == []


def test_a_server_that_ignores_the_request_for_a_part_is_read_again(cache, data, serve, monkeypatch):
    server = serve(PACKED, break_after=60, ranges=False)
    broken = server.server.RequestHandlerClass.do_GET

    def whole_the_second_time(handler):
        if server.requests:
            name = handler.path.strip("/")
            server.requests.append((name, handler.headers["Range"]))
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(PACKED[name])))
            handler.end_headers()
            handler.wfile.write(PACKED[name])
        else:
            broken(handler)

    monkeypatch.setattr(server.server.RequestHandlerClass, "do_GET", whole_the_second_time)
    fetch(source(server.address), progress=False)
    assert server.requests[1] == ("images.gz", "bytes=60-")
    assert locate(source()).read("images") == CONTENTS["images"]


@pytest.mark.parametrize("content", [b"something else", PACKED["images.gz"] + b"more"])
def test_fetch_refuses_another_file_and_leaves_nothing(cache, data, serve, content):
    server = serve({**PACKED, "images.gz": content})
    with pytest.raises(DataError, match=r"images\.gz could not be downloaded:\n  http://127\.0\.0\.1"):
        fetch(source(server.address), progress=False)
    assert list((cache / "data" / "toys").iterdir()) == []


def test_a_server_that_is_not_there(cache, data):
    with pytest.raises(DataError, match=r"images\.gz could not be downloaded"):
        fetch(source("http://127.0.0.1:9/"), progress=False)


@pytest.fixture
def toys(monkeypatch, serve):
    """The set is one of the zoo's."""
    server = serve(PACKED)
    monkeypatch.setattr(availability_module, "source_of", lambda name: source(server.address))
    return server


def test_fetch_dataset_downloads_only_what_is_not_here(cache, data, toys):
    assert not availability("toys").available
    assert "refluence data fetch toys" in availability("toys").detail
    assert toys.requests == []
    assert fetch_dataset("toys", progress=False).folder == cache / "data" / "toys"
    asked = len(toys.requests)
    assert fetch_dataset("toys", progress=False).available
    assert len(toys.requests) == asked


def test_fetch_dataset_repairs_the_cache_but_not_the_users_files(cache, data, toys):
    put(cache / "data" / "toys", {**PACKED, "labels.gz": b"damaged"})
    assert not availability("toys").available
    assert fetch_dataset("toys", progress=False).available
    asked = len(toys.requests)
    put(data / "toys", {**CONTENTS, "labels": b"damaged"})
    with pytest.raises(DataError, match="labels is not the published file"):
        fetch_dataset("toys", progress=False)
    assert len(toys.requests) == asked
    assert (data / "toys" / "labels").read_bytes() == b"damaged"


@pytest.mark.parametrize("name", [name for name in dataset_names() if source_of(name)])
def test_every_source_of_the_zoo_is_whole(name, data, cache):
    real = source_of(name)
    assert real.name == name
    text = str(missing(real))
    assert f"`refluence data fetch {name}`" in text
    assert text.count("$REFLUENCE_DATA") == 2
    for file in (*real.downloads, *(file for layout in real.layouts for file in layout.files)):
        assert len(bytes.fromhex(file.sha256)) == 32
    assert all(mirror.endswith("/") for download in real.downloads for mirror in download.mirrors)
    names = {download.name.removesuffix(".gz") for download in real.downloads} | {d.name for d in real.downloads}
    found_once_fetched = [
        layout
        for layout in real.layouts
        if real.folder in layout.folders and {file.name for file in layout.files} <= names
    ]
    assert found_once_fetched
