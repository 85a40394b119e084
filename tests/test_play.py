"""The page to play with: its calls, whom they answer, and the page itself in a browser."""
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
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
TOKENS = [1, 1, 2, 3, 60, 63]


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
    headers = {"Origin": f"http://{server.host}"} | {name.replace("_", "-"): text for name, text in headers.items()}
    try:
        return urllib.request.urlopen(urllib.request.Request(f"http://{server.host}{path}", body, headers))
    except urllib.error.HTTPError as error:
        return error


def ask(server, call, **request):
    """The lines of an answer; images become arrays."""
    with send(server, "/" + call, json.dumps(request).encode()) as response:
        assert response.status == 200, response.read()
        answers = [json.loads(line) for line in response]
    for answer in answers:
        if "image" in answer:
            answer["image"] = np.frombuffer(base64.b64decode(answer["image"]), np.float32)
    return answers


def test_an_image_becomes_a_set_and_the_set_an_image(server):
    """Fails if the calls give other tokens or images than the tokenizer, or the order of a set changes its image."""
    tokenizer, digit = server.model.tokenizer, server.model.tests.images[3:4]
    assert np.array_equal(ask(server, "test", number=3)[0]["image"], (digit / 127.5 - 1).flatten())
    [answer] = ask(server, "encode", pixels=digit.flatten().tolist())
    tokens = tokenizer.encode(digit / 127.5 - 1)
    assert answer["tokens"] == sorted(tokens[0].tolist())
    first, turned, other = (ask(server, "decode", tokens=some)[0]["image"]
                            for some in (answer["tokens"], answer["tokens"][::-1], [5]))
    assert np.allclose(first, tokenizer.decode(tokens).flatten(), atol=1e-4)
    assert abs(first - turned).max() < 1e-4 < abs(first - other).max()


@pytest.mark.parametrize("tokens", [[], [9], TOKENS[1:], TOKENS, [63] * 5 + [0] * 6], ids=len)
def test_adjusting_makes_the_sum_right(server, tokens):
    """Fails if the adjusted set does not have M tokens, or more changes than it needs."""
    after = ask(server, "adjust", tokens=tokens)[0]["tokens"]
    assert len(after) == M
    before, after = (np.bincount(np.array(some, int), minlength=C) for some in (tokens, after))
    assert abs(after - before).sum() == abs(M - len(tokens))


@pytest.mark.parametrize("t", [1, 0.8, 0.4, 0.2, 0])
def test_generation_goes_from_noise_or_a_set_to_an_image(server, t):
    """Fails if a state's time is wrong, its sum is not M, its image is another set's, the seed is ignored, or
    generation does not start from the set."""
    request = dict(label=3, steps=4, guidance="2", seed=1, t=t, tokens=TOKENS)
    states = ask(server, "generate", **request)
    times = [t] + [s for s in sampling_times(4, server.model.settings["times"]) if s < t]
    assert [state["t"] for state in states] == times and states[0]["states"] == len(times)
    for state in states:
        assert sum(state["counts"]) == M
        tokens = np.repeat(np.arange(C), state["counts"][:C]).tolist()
        assert np.allclose(ask(server, "decode", tokens=tokens)[0]["image"], state["image"], atol=1e-4)
    counts, again, other = ([state["counts"] for state in some] for some in (
        states, ask(server, "generate", **request), ask(server, "generate", **request | {"seed": 2})))
    assert counts == again and (counts != other or t < 0.3)
    kept = np.minimum(counts[0][:C], np.bincount(TOKENS, minlength=C)).sum()
    assert kept == M if t == 0 else kept > 0 or t > 0.3


@pytest.mark.parametrize("path, body, headers, words", [
    ("/test", b'{"number": 0}', {"Origin": "http://example.com"}, "only the page itself"),
    ("/test", b'{"number": 0}', {"Host": "example.com"}, "only the page itself"),
    ("/test", b'{"number": 0}', {"Content_Length": str(play.MAX_BODY + 1)}, "at most"),
    ("/encode", b'{"pixels": [1, 2, 3]}', {}, "28"),
    ("/__init__", b"{}", {}, "no such call"),
    ("/decode", b'{"tokens": [64]}', {}, "outside [0, 64)"),
    ("/generate", b'{"steps": 2, "guidance": "1", "t": 0.5, "seed": 0, "tokens": [1]}', {}, "must have 6 tokens"),
    ("/", None, {"Host": "example.com"}, "the page is at"),
    ("/play.py", None, {}, "the page is at"),
])
def test_bad_requests_get_one_sentence(server, path, body, headers, words, capfd):
    """Fails if another site could use the server, a request could fill the memory, or a bad one gets a traceback."""
    with send(server, path, body, **headers) as response:
        text = response.read().decode()
    assert response.status == 400 and words in text and "\n" not in text
    assert not capfd.readouterr().err


def test_the_page_has_the_models_sizes_and_loads_nothing(server):
    """Fails if the page lacks a size, a class name could end its script, or it asks for files of other places."""
    with send(server, "/") as response:
        page = response.read().decode()
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    facts = json.loads(page.split("const model = ")[1].split(";  //")[0])
    assert (facts["M"], facts["C"], facts["size"], facts["tests"], facts["digits"]) == (M, C, 28, 10000, True)
    assert facts["masked"] == (server.model.denoiser.codebook_size > C) and facts["classes"][0] == "</script>"
    assert page.count("</script>") == 1 and "src=" not in page and "http" not in page and "@import" not in page


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    """Fails if drawing, changing, adjusting or generating a set goes wrong in Chromium, the page does not fit a phone,
    or play.py writes a file or does not end by Ctrl-C."""
    pytest.importorskip("selenium.webdriver.support.wait")
    from selenium import webdriver
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    command = [sys.executable, f"{ROOT}/play.py", f"--ckpt={ROOT}/digits.pt", "--no_browser"]
    player = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores it
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-background-networking", "window-size=1280,1000"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(player.stdout.readline().split()[1])
        play_with(browser, webdriver)
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        browser.quit()
        player.send_signal(signal.SIGINT)
        _, errors = player.communicate(timeout=60)
    assert player.returncode == 0 and errors == "" and os.listdir(tmp_path) == []


def play_with(browser, webdriver):
    """What a visitor does, with a model of 32 tokens."""
    js, wait = browser.execute_script, webdriver.support.wait.WebDriverWait(browser, 120).until

    def shows(name, text):
        wait(lambda _: text in browser.find_element("id", name).text)

    def settled(_):
        return js("return tokens.length == 32 && tokens.every(j => effects[j])")

    wait(settled)
    pixels = "return [...image]"
    of_test_digit = js(pixels)
    js("effects = {}")
    pad = browser.find_element("id", "pad")
    mouse = webdriver.ActionChains(browser, duration=50).move_to_element_with_offset(pad, 5, -70)
    mouse.click_and_hold().move_by_offset(-5, 70).move_by_offset(-5, 70).release().perform()  # a one
    wait(lambda _: settled(_) and js(pixels) != of_test_digit)
    shows("sum_text", "sum to 32 = M")
    order, image = js("return tokens"), js(pixels)
    assert max(image) > 0.6
    browser.find_element("id", "shuffle").click()
    shows("moved", "The tokens moved, the image did not")
    assert js("return tokens") != order == sorted(js("return tokens"))
    assert np.allclose(js(pixels), image, atol=1e-4)
    browser.find_element("css selector", "#tiles .token").click()
    shows("sum_text", "sum to 31, 1 fewer than M = 32")
    shows("sum_text", "greedy_adjust() (Algorithm 1) would add code")
    browser.find_element("id", "adjust").click()
    shows("sum_text", "sum to 32 = M")
    browser.find_element("name", "label").send_keys("3")
    browser.find_element("css selector", "form button").click()
    shows("state", "t = 0.00: the counts sum to 32 = M")
    assert not browser.find_element("id", "problem").is_displayed()
    size = {"width": 390, "height": 3000, "deviceScaleFactor": 1, "mobile": True}  # of a phone
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert js("return document.documentElement.scrollWidth") == 390
