"The attribute classifier: guards that its page does not show."
import subprocess, sys
from dataclasses import replace
import pytest
import torch
import yaml
from t2i_nb.classifier import (ClassifierConfig, augment, build_classifier, classifier_scores, draw_flowers, fit_size, fresh_drawings, load_classifier,
                               make_classifier, read_attributes, to_pixel_values, train_classifier)
from t2i_nb.core import InputError, keyed_generator, pretrained_dir
from t2i_nb.data import ATTRIBUTES, held_out_triples

SHORT = ClassifierConfig(n_images=64, images=256, width=8)

@pytest.fixture(scope='module')
def drawn(): return fresh_drawings(64, held_out=True)

def test_drawings_are_of_the_kind_that_was_asked_for(drawn):
    triples = [{(a['colour'], a['shape'], a['count']) for a in fresh_drawings(64, kind)[0]} for kind in (True, False)]
    assert triples[0] <= held_out_triples() and not triples[1] & held_out_triples()
    assert drawn[1].shape == (64, 3, 64, 64) and -1 <= drawn[1].min() < -.5 and .9 < drawn[1].max() <= 1

def test_shipped_weights_and_their_recipe(drawn):
    recipe = yaml.safe_load((pretrained_dir()/'classifier'/'recipe.yaml').read_text())
    assert all(min(scores.values()) >= .99 for scores in recipe['scores'].values()) and set(recipe['scores']) == {'seen', 'held_out'}
    classifier = load_classifier()
    assert ClassifierConfig(**recipe['config']) == classifier.config == ClassifierConfig()
    assert sum(p.numel() for p in classifier.parameters()) < 500_000 and not classifier.training
    assert min(classifier_scores(classifier, *drawn).values()) >= .98

def test_training_is_keyed(drawn):
    first, again = (next(train_classifier(SHORT)).loss for _ in range(2))
    assert first == again != next(train_classifier(replace(SHORT, seed=1))).loss

def test_augmentation(drawn):
    "Keyed by its generator; with every degradation at zero only the mirror is left"
    cfg, x = ClassifierConfig(), drawn[1][:16]
    once, twice = (augment(x, keyed_generator(0, 'test'), cfg) for _ in range(2))
    assert torch.equal(once, twice) and not torch.equal(once, augment(x, keyed_generator(1, 'test'), cfg))
    clean = augment(x, keyed_generator(0, 'test'), replace(cfg, blur=0, noise=0, brightness=0))
    mirrored = torch.tensor([torch.allclose(a, b.flip(-1), atol=1e-6) for a, b in zip(clean, x)])
    assert 0 < mirrored.sum() < 16
    assert torch.allclose(torch.where(mirrored[:, None, None, None], clean.flip(-1), clean), x, atol=1e-6)

def test_made_written_and_read_again(drawn, tmp_path):
    made = make_classifier(tmp_path/'classifier', SHORT, n=32)
    assert read_attributes(made, drawn[1]) == read_attributes(load_classifier(tmp_path/'classifier'), drawn[1])
    recipe = yaml.safe_load((tmp_path/'classifier'/'recipe.yaml').read_text())
    assert recipe['made_by'] == 't2i_nb.classifier.make_classifier' and recipe['drawings_per_score'] == 32

def test_reading_resizes_clips_and_keeps_the_mode(drawn):
    classifier, x = build_classifier(SHORT), drawn[1][:4]
    assert torch.equal(fit_size(3*x, 64), (3*x).clamp(-1, 1)) and fit_size(x, 32).shape == (4, 3, 32, 32)
    assert classifier.train().training and read_attributes(classifier, x) and classifier.training
    read = read_attributes(classifier, torch.nn.functional.interpolate(x, (96, 96)))
    assert all(r[k] in v for r in read for k, v in ATTRIBUTES.items())

def test_every_form_of_images(drawn):
    from t2i_nb.core import to_pil
    u = draw_flowers(drawn[0][:4], 1, 'check drawing')
    assert u.dtype == torch.uint8 and torch.equal(to_pixel_values(u), drawn[1][:4])
    assert torch.allclose(to_pixel_values(to_pil(drawn[1][:4])), drawn[1][:4], atol=1e-6)

def test_refusals(tmp_path):
    with pytest.raises(InputError, match='there is no classifier in nowhere'): load_classifier('nowhere')
    with pytest.raises(InputError, match='size 18 is not a multiple of 16; use 32'): build_classifier(ClassifierConfig(size=18))

def test_import_is_light():
    code = "import sys, t2i_nb.classifier; print([m for m in ('torch', 'diffusers', 'transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
