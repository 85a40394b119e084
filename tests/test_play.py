"""The page to play with: its calls, whom they answer, and the page itself in a browser."""
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

import play
from fsdd import Denoiser, sampling_times
from support.files import save_checkpoint
from tests.scripts import ROOT

M, C = 6, 64  # of the checkpoint


@pytest.fixture(scope="module", params=["multinomial", "masked"])
def server(request, digits, tmp_path_factory):
    """A running server for a tiny model of the digits with random weights, for each kind of noise."""
    found = torch.load(digits / "fsdd.pt", weights_only=True)
    if request.param == "masked":  # with the mask code
        found["model_config"]["codebook_size"] = C + 1
        found["weights"] = Denoiser(**found["model_config"]).state_dict()
        found["generation"] |= {"prior": "masked", "sampler": "masked", "times": "even"}
    found["class_names"][0] = "</script>"
    path = tmp_path_factory.mktemp("play") / "fsdd.pt"
    save_checkpoint(found, path)
    with play.make_server(str(path)) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def send(server, path, body=None, **headers):
    """Send a request as the page does; returns the response, or the error that it is."""
    address = f"http://127.0.0.1:{server.server_port}"
    own = {} if body is None else {"Origin": address}
    request = urllib.request.Request(address + path, body, own | {k.replace("_", "-"): v for k, v in headers.items()})
    try:
        return urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        return error


def ask(server, call, **request):
    """The lines of an answer."""
    with send(server, "/" + call, json.dumps(request).encode()) as response:
        assert response.status == 200, response.read()
        return [json.loads(line) for line in response]


def pixels(text):
    return np.frombuffer(base64.b64decode(text), np.float32)


def test_an_image_becomes_a_set_and_the_set_an_image(server):
    """Fails if the calls give other tokens or images than the tokenizer, or the order of a set changes its image."""
    tokenizer, tests = server.calls.tokenizer, server.calls.tests
    image = tests.images[3:4] / 127.5 - 1
    [answer] = ask(server, "encode", test=3)
    assert answer["tokens"] == tokenizer.encode(image)[0].tolist() and len(answer["tokens"]) == M
    assert np.array_equal(pixels(answer["original"]), image.flatten())
    [same] = ask(server, "encode", pixels=base64.b64encode(tests.images[3].numpy().tobytes()).decode())
    assert same == answer
    sets = [answer["tokens"], answer["tokens"][::-1], [5] * M]
    [answer] = ask(server, "decode", sets=sets)
    first, reversed_, other = pixels(answer["images"]).reshape(3, -1)
    assert np.allclose(first, tokenizer.decode(torch.tensor(sets[:1])).flatten(), atol=1e-5)
    assert abs(first - reversed_).max() < 1e-4 < abs(first - other).max()
    for number in (0, 1, 2 * M):  # the page takes tokens away and doubles them
        assert len(pixels(ask(server, "decode", sets=[[7] * number])[0]["images"])) == 28 * 28


def test_adjusting_makes_the_sum_right(server):
    """Fails if the adjusted set has not M tokens, or more changes than it needs."""
    for tokens in ([], [9], [1, 1, 2, 3, 60], [1, 1, 2, 3, 60, 63], [63] * 5 + [0] * 6):
        [answer] = ask(server, "adjust", tokens=tokens)
        before, after = (np.bincount(np.array(some, int), minlength=C) for some in (tokens, answer["tokens"]))
        assert after.sum() == M and len(after) == C
        assert abs(after - before).sum() == abs(M - len(tokens))


def test_generation_goes_from_noise_or_a_set_to_an_image(server):
    """Fails if a state's sum is not M, its image is another set's, the seed or class is ignored, or generation does not
    start at t."""
    request = dict(label=3, steps=4, guidance="2", seed=1, tokens=[1, 1, 2, 3, 60, 63])
    times = server.calls.settings["times"]
    states = ask(server, "generate", t=1, **request)
    assert [state["t"] for state in states] == sampling_times(4, times) and states[0]["states"] == 5
    for state in states:
        assert sum(state["counts"]) == M
        [answer] = ask(server, "decode", sets=[np.repeat(np.arange(C), state["counts"][:C]).tolist()])
        assert np.allclose(pixels(answer["images"]), pixels(state["image"]), atol=1e-4)
    assert ask(server, "generate", t=1, **request) == states != ask(server, "generate", t=1, **request | {"seed": 2})
    x0 = np.bincount(request["tokens"], minlength=len(states[0]["counts"])).tolist()
    assert [state["counts"] for state in ask(server, "generate", t=0, **request)] == [x0]
    later = ask(server, "generate", t=0.3, **request)
    assert [state["t"] for state in later] == [0.3] + [s for s in sampling_times(4, times) if s < 0.3]
    assert np.minimum(later[0]["counts"], x0).sum() > 0


def test_states_come_one_by_one(server, monkeypatch):
    """Fails if the first state waits for the others, or an image can't be encoded in the meantime."""
    go_on = threading.Event()

    def refine(denoiser, labels, start, **settings):
        yield start[0]
        assert go_on.wait(60)
        yield start[0]

    monkeypatch.setattr(play, "make_sampler", lambda settings: refine)
    request = dict(label=0, steps=1, guidance="1", seed=0, t=1)
    with send(server, "/generate", json.dumps(request).encode()) as response:
        assert json.loads(response.readline())["t"] == 1
        assert len(ask(server, "encode", test=0)[0]["tokens"]) == M
        go_on.set()
        assert json.loads(response.readline())["t"] == 0


@pytest.mark.parametrize("path, body, headers, words", [
    ("/encode", b'{"test": 0}', {"Origin": "http://example.com"}, "only the page itself"),
    ("/encode", b'{"test": 0}', {"Origin": "null"}, "only the page itself"),
    ("/encode", b'{"test": 0}', {"Host": "example.com"}, "only the page itself"),
    ("/encode", b'{"test": 0}', {"Content_Length": str(play.MAX_BODY + 1)}, "at most"),
    ("/encode", b'{"test": 0}', {"Content_Length": "-1"}, "at most"),
    ("/encode", b'{"test": 10000}', {}, "10000"), ("/encode", b'{"pixels": "AAAA"}', {}, "28"),
    ("/encode", b"{", {}, "Expecting"), ("/encode", b"[]", {}, "/encode"), ("/facts", b"{}", {}, "/facts"),
    ("/decode", b'{"sets": [[64]]}', {}, r"outside [0, 64)"), ("/decode", b'{"sets": [[1], [1, 2]]}', {}, "length"),
    ("/generate", b'{"steps": 2, "guidance": "x", "t": 1}', {}, "guidance must be"),
    ("/generate", b'{"steps": 2, "guidance": "1", "t": 0.5, "seed": 0, "tokens": [1]}', {}, "must have 6 tokens"),
    ("/", None, {"Host": "example.com"}, "nothing here"), ("/play.py", None, {}, "nothing here"),
])
def test_bad_requests_get_one_sentence(server, path, body, headers, words, capfd):
    """Fails if another site could use the server, a request could fill the memory, or a bad one gets a traceback."""
    with send(server, path, body, **headers) as response:
        text = response.read().decode()
    assert response.status == 400 and words in text and "\n" not in text
    assert not capfd.readouterr().err


def test_the_page_has_the_models_sizes_and_loads_nothing(server):
    """Fails if the page lacks a size, a class name could end its script, or it asks for files of other places."""
    with send(server, "/", Host=f"localhost:{server.server_port}") as response:
        page = response.read().decode()
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    facts = json.loads(page.split("const model = ")[1].split(";  //")[0])
    assert (facts["M"], facts["C"], facts["size"], facts["tests"], facts["digits"]) == (M, C, 28, 10000, True)
    assert facts["masked"] == (server.calls.denoiser.codebook_size > C) and facts["classes"][0] == "</script>"
    assert page.count("</script>") == 1 and "src=" not in page and "http" not in page and "@import" not in page


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    """Fails if drawing, changing, adjusting or generating a set goes wrong in Chromium, the page does not fit a phone,
    or play.py writes a file or does not end by Ctrl-C. Screenshots are kept in the test's folder."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, f"{ROOT}/play.py", f"--ckpt={ROOT}/digits.pt", "--no_browser"]
    player = subprocess.Popen(command, cwd=empty, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update",
                 "disable-background-networking", "disable-sync", "window-size=1280,1000",
                 f"user-data-dir={tmp_path}/browser"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(player.stdout.readline().split()[1])
        play_with(browser, webdriver, tmp_path)
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        browser.quit()
        player.send_signal(signal.SIGINT)
        _, errors = player.communicate(timeout=60)
    assert player.returncode == 0 and errors == "" and os.listdir(empty) == []


def play_with(browser, webdriver, folder):
    """What a visitor does, with a model of 32 tokens."""
    def find(name):
        return browser.find_element("id", name)

    def wait(condition):
        end = time.time() + 120
        while not condition():
            assert time.time() < end
            time.sleep(0.05)

    def codes():
        return browser.execute_script("return [...tiles.children].map(tile => tile.value)")

    def pixels_of(name):
        return browser.execute_script("return [...arguments[0].getContext('2d').getImageData(0, 0, 28, 28).data]",
                                      find(name))

    def screenshots(name):
        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
                {"name": "prefers-color-scheme", "value": scheme}]})
            for height in (900, browser.execute_script("return document.documentElement.scrollHeight")):
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                    "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
                time.sleep(0.5)  # to lay out and paint the page
            assert browser.execute_script("return document.documentElement.scrollWidth") == width
            browser.save_screenshot(f"{folder}/{name}-{width}-{scheme}.png")
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    wait(lambda: len(codes()) == 32)
    of_test_digit = codes()
    mouse = webdriver.ActionChains(browser, duration=50).move_to_element_with_offset(find("pad"), 5, -70)
    mouse.click_and_hold().move_by_offset(-5, 70).move_by_offset(-5, 70).release().perform()  # a one
    wait(lambda: codes() != of_test_digit and len(codes()) == 32)
    image = pixels_of("image")
    assert max(image[::4]) > 200 and "sum to 32 = M" in find("sum_text").text
    order = codes()
    find("shuffle").click()
    wait(lambda: "The tokens moved, the image did not" in find("moved").text)
    assert codes() != order and sorted(codes()) == sorted(order) and pixels_of("image") == image
    wait(lambda: browser.execute_script("return document.getAnimations().length") == 0)  # the tiles have arrived
    browser.find_element("css selector", "#tiles .token").click()
    wait(lambda: "greedy_adjust() (Algorithm 1) would add code" in find("sum_text").text)
    assert "sum to 31, 1 fewer than M = 32" in find("sum_text").text and len(codes()) == 31
    screenshots("taken-away")
    find("adjust").click()
    wait(lambda: "sum to 32 = M" in find("sum_text").text and len(codes()) == 32)
    find("label").send_keys("3")
    find("go").click()
    wait(lambda: find("state").text.startswith("t = 0.00: the counts sum to 32 = M"))
    assert max(pixels_of("generated")[::4]) > 200 and not find("problem").is_displayed()
    browser.execute_script("visit(Math.floor(states.length / 2))")
    screenshots("generated")
