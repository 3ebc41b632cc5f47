# The architecture of ZAYA1-8B, for 8 GPUs of 80 GB or more: torchrun --nproc_per_node=8 train.py config/8b.py
# Not run yet. evidence/paper.py estimates its memory: 25 GB per GPU on 8 GPUs (113 GB on one GPU), and 17 GB more per
# additional 32K tokens in a micro-batch. With 192 GB per GPU, batch_size = 32 and grad_accum = 8 fit.
# First prepare your own corpus: python -m data.text.prepare FILES_OR_FOLDERS --vocab_size=50304
out_dir = 'runs/8b'
dataset = 'data/text'
context = 4096
n_layer = 40
n_embd = 2048
n_head = 8              # query latent 1024, half of n_embd
n_kv_head = 2           # KV latent 256, an eighth of n_embd
head_dim = 128
n_expert = 16
expert_dim = 2048
router_dim = 256
skip_expert = True      # required to save the model in the released format
shard = True
recompute = True
batch_size = 4          # 4 * 4096 * 64 = 1,048,576 tokens per step
grad_accum = 64         # in total; 8 per GPU on 8 GPUs
max_steps = 20_000      # 21B tokens
warmup_steps = 500
lr = 1e-3
min_lr = 1e-4
balancer_lr = 1e-3
eval_every = 500
checkpoint_every = 500  # 68 GB each; two are kept, and a third exists while it is written
