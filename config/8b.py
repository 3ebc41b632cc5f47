# ZAYA1-8B's own shape, on 8 GPUs of 80 GB or more: torchrun --nproc_per_node=8 train.py config/8b.py
# evidence/paper.py works out what it takes: 25 GB on each of 8 GPUs (113 GB on one), 17 more for every further 32K
# tokens in a micro-batch. On 192 GB, batch_size = 32 with grad_accum = 8 fits. Nobody has run it yet.
# Prepare a corpus of your own first: python -m data.text.prepare FILES_OR_FOLDERS --vocab_size=50304
out_dir = 'runs/8b'
dataset = 'data/text'
context = 4096
n_layer = 40
n_embd = 2048
n_head = 8              # query latent 1024, half of n_embd
n_kv_head = 2           # KV latent 256, an eighth
head_dim = 128
n_expert = 16
expert_dim = 2048
router_dim = 256
skip_expert = True      # to export it in the released layout
shard = True
recompute = True
batch_size = 4          # 4 * 4096 * 64 = 1,048,576 tokens a step
grad_accum = 64         # over all processes together: 8 GPUs take 8 each
max_steps = 20_000      # 21B tokens
warmup_steps = 500
lr = 1e-3
min_lr = 1e-4
balancer_lr = 1e-3
eval_every = 500
checkpoint_every = 500  # 68 GB each, of which two are kept, and three are there while one is written
