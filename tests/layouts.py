"Small data sets and models in exactly the layout in which their authors publish them; toy flowers stand for the photographs."
import numpy as np
from t2i_nb.core import pretrained_dir
from t2i_nb.data import DataConfig, toy_flowers
from t2i_nb.sources import ADJECTIVES, FACE, HAIR, WEARING

CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()

def cifar10(root, n=10):
    "`root/cifar10` with n images in each of the six binary files"
    folder, flowers = root/'cifar10'/'cifar-10-batches-bin', toy_flowers(DataConfig(n_images=6*n, size=32))
    folder.mkdir(parents=True)
    (folder/'batches.meta.txt').write_text('\n'.join(CLASSES) + '\n')
    for k, name in enumerate([*(f'data_batch_{j}' for j in range(1, 6)), 'test_batch']):
        rows = [bytes([i % 10]) + np.asarray(flowers.image(n*k + i)).transpose(2, 0, 1).tobytes() for i in range(n)]
        (folder/f'{name}.bin').write_bytes(b''.join(rows))

def flowers102(root, n=24):
    "`root/flowers102` with n images of ten captions each"
    folder, flowers = root/'flowers102', toy_flowers(DataConfig(n_images=10*n, size=96))
    (folder/'jpg').mkdir(parents=True)
    for i in range(n):
        flowers.image(i).save(folder/'jpg'/f'image_{i + 1:05}.jpg')
        text = folder/'text_c10'/f'class_{i % 3 + 1:05}'/f'image_{i + 1:05}.txt'
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text('\n'.join(flowers.captions[10*i:10*i + 10]) + '\n')

def celeba(root, n=24):
    "`root/celeba` with n faces: attributes, partition, boxes and landmarks"
    folder, flowers = root/'celeba', toy_flowers(DataConfig(n_images=n, size=178))
    names, files = sorted({*HAIR, *FACE, *WEARING, *ADJECTIVES, 'Male', 'No_Beard', 'Blurry'}), [f'{i:06}.jpg' for i in range(1, n + 1)]
    (folder/'img_align_celeba').mkdir(parents=True)
    for i, f in enumerate(files): flowers.image(i).save(folder/'img_align_celeba'/f)
    flags = [' '.join('1' if (i*j) % 7 == 1 else '-1' for j in range(1, 41)) for i in range(n)]
    rows = dict(list_attr_celeba=[str(n), ' '.join(names), *(f'{f}  {a}' for f, a in zip(files, flags))],
                list_eval_partition=[f'{f} {0 if i < n*2//3 else 1 if i < n*5//6 else 2}' for i, f in enumerate(files)],
                list_bbox_celeba=[str(n), 'image_id x_1 y_1 width height', *(f'{f}    95  71 226 313' for f in files)],
                list_landmarks_align_celeba=[str(n), 'lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y '
                                             'rightmouth_x rightmouth_y', *(f'{f} 69 109 106 113 77 142 73 152 108 154' for f in files)])
    for name, lines in rows.items(): (folder/f'{name}.txt').write_text('\n'.join(lines) + '\n')

def hub(folder, n=24):
    "A data set as the Hugging Face hub keeps it: parquet with an image struct and a text"
    import io, pyarrow, pyarrow.parquet
    flowers, rows = toy_flowers(DataConfig(n_images=n, size=96)), []
    for i in range(n):
        out = io.BytesIO()
        flowers.image(i).save(out, 'PNG')
        rows.append(dict(image=dict(bytes=out.getvalue(), path=f'{i}.png'), text=flowers.captions[i]))
    (folder/'data').mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder/'data'/'train-00000-of-00001.parquet')

def clip(folder):
    "A text encoder in the layout of openai/clip-vit-large-patch14, a thousandth of its size"
    import torch, transformers
    tokenizer = transformers.CLIPTokenizer.from_pretrained(pretrained_dir()/'tokenizer', model_max_length=77)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=77, **ids)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def vae(folder):
    "A VAE in the layout of stabilityai/sd-vae-ft-mse: factor 8, four latent channels, a scaling factor"
    import diffusers, torch
    torch.manual_seed(0)
    diffusers.AutoencoderKL(down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, norm_num_groups=4,
                            block_out_channels=(8, 8, 8, 8), latent_channels=4, scaling_factor=.18215).save_pretrained(folder)
