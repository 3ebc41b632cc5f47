# About as many active parameters as GPT-2, for one or more GPUs of 80 GB. First prepare your own corpus:
#   python -m data.text.prepare FILES_OR_FOLDERS --vocab_size=50304
out_dir = 'runs/medium'
dataset = 'data/text'
context = 1024
n_layer = 16
n_embd = 1024
n_head = 8              # query latent 512, half of n_embd
n_kv_head = 2           # KV latent 128, an eighth of n_embd
head_dim = 64
n_expert = 16
expert_dim = 1024
router_dim = 128
batch_size = 32         # 32 * 1024 * 16 = 524,288 tokens per step
grad_accum = 16         # in total; 2 per GPU on 8 GPUs
max_steps = 20_000      # 10.5B tokens
warmup_steps = 200
lr = 1e-3
min_lr = 1e-4
balancer_lr = 1e-3      # small, for a long run
eval_every = 500
checkpoint_every = 500
compile = True
