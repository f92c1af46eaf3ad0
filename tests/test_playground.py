"The playground without a browser, and in a real JupyterLab in a headless Chromium where both are installed"
import asyncio, base64, json, os, random, re, shutil, signal, socket, subprocess, sys, threading, time, urllib.request
from dataclasses import replace
from pathlib import Path
import pytest
from PIL import Image
from t2i_nb.core import InputError
from t2i_nb.playground import (LEAST_STEPS, Costs, Playground, PlaygroundState, Settings, TorchBackend, check_settings, differences, find_model, fit, fit_in, generate_images, list_weights,
                               open_state, pin, restore, save_shown, seconds_for, signed_png, time_split, unknown_words)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run whose UNet was never trained, with a checkpoint"
    from t2i_nb.run import read_recipe
    from t2i_nb.pipeline import save_pipeline
    from t2i_nb.recipe import load_components
    from t2i_nb.unet import build_unet
    from t2i_nb.objective import Objective
    folder, cfg = tmp_path_factory.mktemp('playground')/'run', read_recipe('demo', ['unet.width=16', 'unet.overrides={}'])
    models = load_components(cfg)
    z, dim = models.vae.config.latent_channels, models.text_encoder.config.hidden_size
    save_pipeline(folder/'pipeline', build_unet(cfg.unet, z, 8, dim, 0), models, Objective(cfg.objective))
    checkpoint = folder/'checkpoints'/'img-00000100'
    checkpoint.mkdir(parents=True)
    for name in ('unet', 'ema'): shutil.copy(folder/'pipeline'/'unet'/'diffusion_pytorch_model.safetensors', checkpoint/f'{name}.safetensors')
    return folder

def pretend(settings, report):
    "A backend that costs nothing"
    for i in range(settings.num_inference_steps):
        if report(i + 1, lambda: Image.new('RGB', (8, 8))): raise InputError('stopped')
    return Image.new('RGB', (settings.size,)*2, (settings.seed % 256, 0, 0)), dict(text=.001, unet=.002*settings.num_inference_steps, vae=.003, other=0.)

def wait_until(done, seconds=240):
    end = time.time() + seconds
    while not done():
        assert time.time() < end, 'it took too long'
        time.sleep(.01)

def test_nothing_that_can_be_typed_ends_in_a_traceback(run):
    rng, state, drawn = random.Random(0), open_state(run, dict(torch=pretend)), 0
    choose = dict(prompt=['', ' \n', 'a red flower', 'é 🌸 \x00', 'red '*200, '<b>&'], negative_prompt=['', 'blue', 'blue '*99], seed=[0, 7, -1, 2**32, 10**30],
                  num_inference_steps=[1, 2, 0, -5, 10**9], guidance_scale=[1., 3., -1., float('nan'), float('inf')], sampler=['heun', 'dpmpp_2m', '', 'eular'],
                  size=[64, 96, 0, -64, 65, 10**6], weights=['pipeline', 'img-00000100 last', 'gone'], backend=['torch', '', 'onnx'])
    for _ in range(150):
        usual = dict(prompt='a flower', num_inference_steps=2, sampler='heun', size=64, weights='pipeline', backend='torch')
        state.settings = Settings(**usual | {k: rng.choice(choose[k]) for k in rng.sample(list(choose), rng.randint(1, 3))})
        before = len(state.history)
        generate_images(state)
        assert state.status and '\n' not in state.status and 'this did not work' not in state.status and not state.busy
        try: check_settings(state.settings, state.model, state.backends); fine = True
        except InputError as e: fine = False; assert state.status == str(e)
        assert len(state.history) - before == fine
        drawn += fine
    assert 8 < drawn < 140

def test_a_model_that_is_missing_or_damaged_is_named_in_the_panel(run, tmp_path):
    (tmp_path/'empty').mkdir()
    shutil.copytree(run, tmp_path/'damaged')
    (tmp_path/'damaged'/'pipeline'/'unet'/'config.json').write_text('{')
    shutil.copytree(run, tmp_path/'cut')
    weights = tmp_path/'cut'/'pipeline'/'unet'/'diffusion_pytorch_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in ('absent', 'empty', 'damaged', 'cut'):
        panel = Playground(tmp_path/name)
        panel.fields['prompt'].value = 'a flower'
        panel.buttons['generate'].click()
        wait_until(lambda: not panel.state.busy)
        assert panel.state.status and panel.state.status != 'write a prompt and press Generate' and not panel.state.history, name
    assert 'holds no pipeline' in Playground(tmp_path/'absent').status.value

def test_cancel_stops_within_one_step_and_widgets_belong_to_one_thread(run):
    panel, threads, passes = Playground(run, dict(torch=TorchBackend(find_model(run), 'cpu'))), set(), []
    torch_backend, update = panel.state.backends['torch'], panel.update
    def counted(settings, report):
        return torch_backend(settings, lambda n, look: (passes.append((n, panel.state.cancelled.is_set())), report(n, look))[1])
    panel.state.backends['torch'] = counted
    panel.update = lambda: (threads.add(threading.get_ident()), update())
    async def user(): # the event loop of a kernel
        panel.fields['prompt'].value, panel.fields['num_inference_steps'].value = 'a red flower', 1000
        panel.buttons['generate'].click()
        while len(passes) < 3: await asyncio.sleep(.001)
        assert panel.state.busy and not panel.buttons['cancel'].disabled
        panel.buttons['cancel'].click()
        while panel.state.busy or panel.waiting: await asyncio.sleep(.001)
    asyncio.run(asyncio.wait_for(user(), 240))
    assert threads == {threading.get_ident()}
    assert len(passes) < 1000 and sum(cancelled for _, cancelled in passes) <= 1
    assert panel.state.status.startswith('cancelled after step') and panel.buttons['cancel'].disabled and not panel.state.history

def test_the_history_restores_everything_and_the_dice_roll_only_when_unlocked(run):
    state, rng = open_state(run, dict(torch=pretend, other=pretend)), random.Random(1)
    for i in range(12):
        state.locked = i % 2 == 0
        state.settings = replace(state.settings, prompt=f'flower {i}', size=rng.choice([64, 96]), guidance_scale=1. + i, backend=rng.choice(['torch', 'other']),
                                 sampler=rng.choice(['heun', 'euler']), weights=rng.choice(list(state.model.weights)), seed=10**7 + i)
        generate_images(state)
        assert (state.shown.settings.seed == 10**7 + i) == state.locked
    for i in rng.sample(range(12), 12):
        restore(state, i)
        assert state.settings == state.history[i].settings == state.shown.settings and state.settings.prompt == f'flower {i}' and state.locked

def test_what_fits_is_the_most_that_fits():
    rng = random.Random(2)
    for _ in range(300):
        costs = Costs(fixed=rng.uniform(0, .1), plain=(p := rng.uniform(.001, .1)), guided=p*rng.uniform(1.1, 2.))
        wish = Settings('a', num_inference_steps=rng.randint(1, 60), guidance_scale=rng.choice([1., 3.]), sampler=rng.choice(['heun', 'dpmpp_2m', 'euler']))
        ms = rng.uniform(1, 3000)
        try: found = fit_in(ms, wish, costs)
        except InputError: # then the cheapest does not fit either
            cheapest = replace(wish, num_inference_steps=min(wish.num_inference_steps, LEAST_STEPS), guidance_scale=1., sampler='dpmpp_2m')
            assert 1000*seconds_for(cheapest, costs) > ms
            continue
        assert 1000*seconds_for(found, costs) <= ms
        if found == wish: continue
        more = replace(found, num_inference_steps=found.num_inference_steps + 1)
        assert 1000*seconds_for(more, costs) > ms or found.num_inference_steps == wish.num_inference_steps
        same = ('prompt', 'negative_prompt', 'seed', 'size', 'weights', 'backend')
        assert [getattr(found, k) for k in same] == [getattr(wish, k) for k in same]

def test_fitting_measures_once_for_each_backend_and_size(run):
    calls = []
    state = open_state(run, dict(torch=lambda s, report: (calls.append(s.size), pretend(s, report))[1]))
    state.settings = Settings('a flower', num_inference_steps=50, size=64)
    fit(state, 41.)
    once = len(calls)
    assert state.settings.num_inference_steps == 18 and 'about 40 ms' in state.status and isinstance(state, PlaygroundState) # 4 + 2 n
    fit(state, 21.)
    assert (len(calls), state.settings.num_inference_steps) == (once, 8)
    fit(state, 1.)
    assert 'too few' in state.status and state.settings.num_inference_steps == 8

def test_one_click_draws_several_images_from_the_seeds_that_follow(run, tmp_path):
    state = open_state(run, dict(torch=pretend))
    assert not state.locked and state.n_images == 1
    state.settings, state.locked, state.n_images = replace(state.settings, prompt='a red banana, a flower', seed=2**32 - 2), True, 4
    generate_images(state)
    assert [d.settings.seed for d in state.history] == [2**32 - 2, 2**32 - 1, 0, 1] and state.settings.seed == 2**32 - 2
    assert state.status.endswith('words the model does not know: banana') and unknown_words(state.model, 'a large red flower') == []
    def second_cancels(settings, report):
        if settings.seed == 2**32 - 1: raise InputError('stopped')
        return pretend(settings, report)
    state.backends['torch'] = second_cancels
    generate_images(state)
    assert len(state.history) == 5 and state.status == 'stopped'

def test_unknown_words_do_not_depend_on_padding(run, tmp_path):
    import tokenizers
    shutil.copytree(run/'pipeline'/'tokenizer', tmp_path/'tokenizer')
    padded = tokenizers.Tokenizer.from_file(str(tmp_path/'tokenizer'/'tokenizer.json'))
    padded.enable_padding(length=28)
    padded.save(str(tmp_path/'tokenizer'/'tokenizer.json'))
    assert unknown_words(replace(find_model(run), folder=tmp_path), 'A large red flower, a banana') == ['banana']

def test_saved_images_carry_their_recipe(run):
    from t2i_nb.provenance import read_provenance
    state = open_state(run, dict(torch=pretend))
    assert save_shown(state) is None and 'no image to save' in state.status
    state.settings = replace(state.settings, prompt='a red flower', seed=3)
    state.locked = True
    generate_images(state)
    first, second = save_shown(state), save_shown(state)
    assert first != second and first.parent == run/'playground' and str(second) in state.status
    assert read_provenance(first)['seed'] == 3 and read_provenance(first)['prompt'] == 'a red flower'

def test_the_panel_reads_its_widgets_and_describes_its_images(run):
    panel = Playground(run, dict(torch=pretend))
    panel.example.value, panel.n_images.value = panel.example.options[1], 2
    assert panel.fields['prompt'].value == panel.example.options[1] and not panel.lock.value
    for press in ('generate', 'compare', 'save'):
        panel.buttons[press].click()
        wait_until(lambda: len(panel.gallery.children) == 2 and not panel.buttons['generate'].disabled) # the thread's last update
    assert panel.state.status.startswith('saved as')
    shown = [panel.image, panel.pinned, *(o.children[0] for o in panel.gallery.children)]
    assert all(re.match(r'<img alt="[^"]+" style="[^"]*" src="data:image/png;base64,', o.value) for o in shown)
    assert all(b.description or b.tooltip for b in [*panel.buttons.values(), panel.lock]) and all(o.children[1].tooltip for o in panel.gallery.children)

def test_what_the_session_does_with_weights_and_failures(run):
    model = find_model(run)
    assert list(model.weights) == ['pipeline', 'img-00000100 EMA', 'img-00000100 last'] and list_weights(run, run/'pipeline') == model.weights
    backend, wish = TorchBackend(model, 'cpu'), replace(model.defaults, prompt='a flower', num_inference_steps=2)
    image, seconds = backend(wish, lambda n, look: None)
    assert backend(replace(wish, size=96), lambda n, look: None)[0].size == (96, 96) and sorted(seconds) == ['other', 'text', 'unet', 'vae']
    assert b'prompt' in signed_png(image, wish, model) and b'prompt' not in signed_png(image, replace(wish, weights='img-00000100 last'), model)
    kept = (run/'checkpoints'/'img-00000100'/'ema.safetensors').rename(run/'kept')
    with pytest.raises(InputError, match='is gone'): backend(replace(wish, weights='img-00000100 EMA'), lambda n, look: None)
    kept.rename(run/'checkpoints'/'img-00000100'/'ema.safetensors')
    assert backend(wish, lambda n, look: None)[0].tobytes() == image.tobytes()
    def broken(settings, report): raise RuntimeError('out of\nmemory')
    state = open_state(run, dict(torch=broken))
    state.settings = wish
    generate_images(state)
    assert state.status == 'this did not work (RuntimeError): out of memory' and not state.history

def test_two_images_are_compared_by_what_was_changed(run):
    state = open_state(run, dict(torch=pretend))
    state.settings, state.locked = replace(state.settings, prompt='a flower', num_inference_steps=12, seed=1), True
    generate_images(state)
    pin(state)
    state.settings = replace(state.settings, num_inference_steps=4)
    generate_images(state)
    assert differences(state.pinned, state.shown) == 'steps 12 → 4; 28 → 12 ms' and differences(state.shown, state.shown).startswith('same settings; ')
    pin(state)
    pin(state)
    assert state.pinned is None
    assert time_split(dict(text=.004, unet=.12, vae=.016, other=.01)) == '150 ms: text 4, UNet 120, VAE 16, rest 10'

class Browser:
    "Chromium by its own protocol"
    def __init__(self, chromium, folder):
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
                 '--disable-sync', '--disable-dev-shm-usage', '--remote-debugging-port=0', '--window-size=1280,900', f'--user-data-dir={folder}']
        self.process = subprocess.Popen([chromium, *flags, 'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self.loop, self.n, self.socket = asyncio.new_event_loop(), 0, None
        try: self.connect(Path(folder)/'DevToolsActivePort')
        except BaseException: self.close(); raise
    def connect(self, port):
        wait_until(lambda: port.is_file() and port.read_text().count('\n') or self.process.poll() is not None, 60)
        with urllib.request.urlopen(f'http://127.0.0.1:{port.read_text().split()[0]}/json/list', timeout=30) as f: pages = json.load(f)
        from tornado.websocket import websocket_connect
        address = next(p['webSocketDebuggerUrl'] for p in pages if p['type'] == 'page')
        async def connect(): return await websocket_connect(address, max_message_size=2**26)
        self.socket = self.loop.run_until_complete(connect())
    def send(self, method, **params):
        self.n += 1
        async def answer():
            await self.socket.write_message(json.dumps(dict(id=self.n, method=method, params=params)))
            while True:
                message = json.loads(await self.socket.read_message())
                if message.get('id') == self.n: return message.get('result', {}) # empty while a page is replaced by the next
        return self.loop.run_until_complete(asyncio.wait_for(answer(), 60))
    def js(self, code): return self.send('Runtime.evaluate', expression=FIND + code, returnByValue=True).get('result', {}).get('value')
    def until(self, code, seconds=120):
        end = time.time() + seconds
        while not (value := self.js(code)):
            if time.time() > end: raise AssertionError(f'{code} never came true; the page says: {self.js("document.body.innerText")[-1500:]}')
            time.sleep(.1)
        return value
    def click(self, element): self.until(f'(e => e && !e.disabled && (e.click(), true))({element})')
    def type(self, label, text): self.choose(label, text)
    def choose(self, label, option):
        self.js(f'(e => {{ e.value = {option!r}; for (const kind of ["input", "change"]) e.dispatchEvent(new Event(kind, {{bubbles: true}})) }})(field({label!r}))')
        time.sleep(1) # what is entered waits while the kernel is busy; a click does not
    def image(self, path): Path(path).write_bytes(base64.b64decode(self.send('Page.captureScreenshot', format='png')['data']))
    def close(self):
        "End Chromium whatever happens; the socket belongs to this loop, and closing it needs the loop to run"
        async def close(): self.socket.close()
        try:
            if self.socket: self.loop.run_until_complete(close())
        finally:
            stop(self.process)
            self.loop.close()

FIND = '''
var output = () => document.querySelector('.jp-OutputArea');
var field = label => [...document.querySelectorAll('.jp-OutputArea .widget-inline-hbox')].filter(e => e.querySelector('label')?.innerText == label)
    .map(e => e.querySelector('input, textarea, select'))[0];
var button = text => [...document.querySelectorAll('.jp-OutputArea button')].find(e => e.innerText.trim() == text);
var thumbs = () => [...document.querySelectorAll('.jp-OutputArea .widget-gridbox button')];
var says = text => output()?.innerText.includes(text);
'''

def stop(process):
    if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)
    try: process.wait(20)
    except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL); process.wait()

def start_lab(lab, folder, cell):
    "A JupyterLab of its own that knows one kernel, this Python, and one notebook; its process and the address of the notebook"
    (folder/'nb').mkdir(parents=True)
    kernel, off = folder/'share'/'kernels'/'ours', folder/'settings'/'@jupyterlab'/'apputils-extension'
    for f in (kernel, off): f.mkdir(parents=True)
    kernelspec = dict(argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name='ours', language='python')
    (kernel/'kernel.json').write_text(json.dumps(kernelspec))
    (off/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    cells = [dict(cell_type='code', id='panel', metadata={}, execution_count=None, outputs=[], source=cell)]
    notebook = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='ours', display_name='ours', language='python')), cells=cells)
    (folder/'nb'/'panel.ipynb').write_text(json.dumps(notebook))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    own = {f'JUPYTER_{k}': str(folder/v) for k, v in dict(PATH='share', CONFIG_DIR='config', DATA_DIR='data', RUNTIME_DIR='runtime').items()}
    env = os.environ | own | dict(JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', IPYTHONDIR=str(folder/'ipython'))
    command = [lab, '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=t',
               f'--ServerApp.root_dir={folder}/nb', '--LabApp.expose_app_in_browser=True']
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=open(folder/'lab.log', 'w'), stderr=subprocess.STDOUT, start_new_session=True)
    def answers():
        assert process.poll() is None, (folder/'lab.log').read_text()[-2000:]
        try: return urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token=t', timeout=5).status == 200
        except OSError: return False
    try: wait_until(answers, 120)
    except BaseException: stop(process); raise
    return process, f'http://127.0.0.1:{port}/lab/tree/panel.ipynb?token=t'

def open_panel(browser, address, seconds=60):
    "Run the notebook's cell; did the panel appear?"
    browser.send('Page.navigate', url=address)
    idle = '!!document.querySelector(".jp-Notebook-ExecutionIndicator[data-status=idle]")'
    end = time.time() + seconds
    while time.time() < end and not browser.js(idle): time.sleep(.2)
    time.sleep(3) # it says idle a moment before it listens
    asked, prompt = 0., '(document.querySelector(".jp-InputPrompt")?.innerText || "").trim()'
    while time.time() < end and not browser.js('!!button("Generate")'):
        assert not browser.js('says("Traceback")'), browser.js('output().innerText')
        if browser.js(prompt) == '[ ]:' and time.time() > asked + 9:
            asked = time.time()
            browser.js('void jupyterapp.commands.execute("notebook:run-all-cells")')
        time.sleep(.2)
    return browser.js('!!button("Generate")')

def user_session(browser, keep=lambda name: None, steps='300'):
    "What the user does: write, generate, compare, cancel, go back, change the backend, and every mistake"
    browser.choose('examples', 'a large red flower with five round petals')
    browser.until('field("prompt").value == "a large red flower with five round petals"')
    browser.click('button("Generate")')
    browser.until('says("ms: text") && thumbs().length == 1')
    browser.click('document.querySelector(".jp-OutputArea button[title=\'keep the seed\']")')
    assert browser.js('[...document.querySelectorAll(".jp-OutputArea .jupyter-widgets img")].every(e => e.alt)')
    assert browser.js('[...document.querySelectorAll(".jp-OutputArea button")].every(e => e.innerText.trim() || e.title)')
    browser.click('button("Save")')
    browser.until('says("saved as ")')
    keep('drawn')
    browser.click('button("Compare")')
    browser.type('steps', '4')
    browser.click('button("Generate")')
    browser.until('says("left to right: steps") && thumbs().length == 2')
    keep('compared')
    browser.type('steps', steps)
    browser.click('button("Generate")')
    browser.until('says("pass ")')
    browser.click('button("Cancel")')
    browser.until('says("cancelled after step")')
    keep('cancelled')
    for label, wrong, message in (('size', '66', 'is not a multiple of'), ('prompt', 'red '*40, 'it would be cut'), ('prompt', '', 'the prompt is empty'),
                               ('guidance', '-3', 'guidance -3 is out of range')):
        browser.type(label, wrong)
        browser.click('button("Generate")')
        browser.until(f'says({message!r})')
        browser.click('thumbs().at(-1)')
        browser.until('says("settings of image 1")')
    assert browser.js('[field("prompt").value, field("size").value]') == ['a large red flower with five round petals', '64']
    assert browser.js('field("steps").value') not in ('4', steps)
    browser.choose('backend', 'onnx')
    browser.click('button("Generate")')
    browser.until('says("backend torch → onnx") && thumbs().length == 3')
    browser.until('says("ms: text") && thumbs().length == 3')
    browser.click('button("Limit time")')
    browser.until('says("about ") || says("too few")')
    keep('fitted')
    assert not browser.js('says("Traceback")') and not browser.js('says("this did not work")')

def find_program(variable, *names):
    return os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)

def jupyter_lab():
    beside = Path(sys.executable).with_name('jupyter-lab')
    return str(beside) if beside.is_file() else find_program('T2I_JUPYTER_LAB', 'jupyter-lab')

def chromium(): return find_program('T2I_CHROMIUM', 'chromium', 'chromium-browser', 'google-chrome')

@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='process groups of POSIX')
def test_in_jupyterlab(run, tmp_path):
    lab, browser_path = jupyter_lab(), chromium()
    if not lab: pytest.skip('no JupyterLab: pip install jupyterlab, or set T2I_JUPYTER_LAB to one in an environment that also has ipywidgets')
    if not browser_path: pytest.skip('no Chromium: install it, or set T2I_CHROMIUM')
    for name in ('ipykernel', 'tornado'): pytest.importorskip(name)
    from t2i_nb.commands import export
    export(run)
    cell = f'from t2i_nb.run import open_playground\nopen_playground({str(run)!r})'
    for attempt in range(4): # on a busy machine Lab now and then loses its kernel while it starts
        process, address = start_lab(lab, tmp_path/f'lab{attempt}', cell)
        browser = None
        try:
            browser = Browser(browser_path, tmp_path/f'profile{attempt}')
            if not open_panel(browser, address): continue
            return user_session(browser)
        finally:
            try:
                if browser: browser.close()
            finally: stop(process)
            assert process.poll() is not None and (browser is None or browser.process.poll() is not None)
    raise AssertionError('the panel did not appear')
