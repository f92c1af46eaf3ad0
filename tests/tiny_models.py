"Models of random weights: the real classes in the real layout, and nothing to download"
import tokenizers, torch, transformers
from t2i_nb.data import WORDS

def tiny_florence2(words):
    "Florence-2 in miniature: a byte tokenizer that knows `words` and the 1,000 places, an image of 17 embeddings"
    locations, specials = [f'<loc_{i}>' for i in range(1000)], ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {w: i for i, w in enumerate([*specials, *letters, *('Ġ' + w for w in words)])}
    tokenizer = transformers.BartTokenizer(vocab=vocab, merges=[], extra_special_tokens=dict(image_token='<image>'))
    tokenizer.add_tokens(locations)
    images = transformers.CLIPImageProcessorPil(size=dict(height=32, width=32), do_center_crop=False)
    images.image_seq_length = 17 # 4×4 places and their mean
    vision = dict(depths=(1, 1), patch_size=(7, 3), patch_stride=(4, 2), patch_padding=(3, 1), embed_dim=(16, 32),
                  patch_prenorm=(False, True), num_heads=(2, 2), num_groups=(2, 2), window_size=4, projection_dim=32,
                  max_position_embeddings=8, initializer_range=.5)
    text = dict(model_type='bart', vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
                max_position_embeddings=256, init_std=.5)
    model = transformers.Florence2ForConditionalGeneration(transformers.Florence2Config(
        text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id))
    suppressed = [i for w, i in tokenizer.get_vocab().items() if w[1:] not in words and w != '</s>']
    model.generation_config.update(suppress_tokens=suppressed, no_repeat_ngram_size=3)
    return model, transformers.Florence2Processor(images, tokenizer, post_processor_config=dict(pure_text={}))

def tiny_blip(words):
    "BLIP in miniature: BERT's tokenizer with `words`, an image of 17 embeddings"
    specials = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate([*specials, *words])})
    small = dict(hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=1, num_attention_heads=2,
                 initializer_range=.5)
    text = dict(vocab_size=len(tokenizer), encoder_hidden_size=32, bos_token_id=2, pad_token_id=0, eos_token_id=3,
                sep_token_id=3, max_position_embeddings=256, **small)
    config = transformers.BlipConfig(text_config=text, vision_config=dict(image_size=32, patch_size=8, **small))
    model = transformers.BlipForConditionalGeneration(config)
    model.text_decoder.generation_config.update(suppress_tokens=[0, 1, 2, 4], no_repeat_ngram_size=3)
    images = transformers.BlipImageProcessorPil(size=dict(height=32, width=32))
    return model, transformers.BlipProcessor(images, tokenizer)

def save_tiny_captioner(folder, family='florence2', seed=0):
    "Save a captioning model of family 'florence2' or 'blip' whose captions are words of the toy flowers in any order"
    known = [s for synonyms in WORDS.values() for o in synonyms.values() for s in o]
    words = sorted({w for s in [*known, 'one flower with petals'] for w in s.split()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = dict(florence2=tiny_florence2, blip=tiny_blip)[family](words)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

def tiny_pipeline(width=32, prediction_type='flow', overrides=None, pixels=False, levels=0):
    "An untrained denoiser between the shipped VAE and text encoder; without VAE, at 16 pixels, where `pixels`"
    from t2i_nb.captions import load_text_encoder
    from t2i_nb.objective import Objective, ObjectiveConfig
    from t2i_nb.pipeline import build_pipeline
    from t2i_nb.recipe import Components
    from t2i_nb.unet import UNetConfig, build_unet
    from t2i_nb.vae import VAEConfig, load_vae
    tokenizer, text_encoder = load_text_encoder()
    size, channels = (16, 3) if pixels else (8, 8)
    unet = build_unet(UNetConfig(width=width, levels=levels, overrides=overrides or {}), size, channels, text_encoder.config.hidden_size)
    vae = None if pixels else load_vae(VAEConfig())
    return build_pipeline(unet.eval(), Components(tokenizer, text_encoder, vae), Objective(ObjectiveConfig(prediction_type=prediction_type)))
