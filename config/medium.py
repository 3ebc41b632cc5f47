# About GPT-2's active parameters, for one 80 GB GPU or several. Prepare a corpus of your own first:
#   python -m data.text.prepare FILES_OR_FOLDERS --vocab_size=50304
out_dir = 'runs/medium'
dataset = 'data/text'
context = 1024
n_layer = 16
n_embd = 1024
n_head = 8              # query latent 512, half of n_embd
n_kv_head = 2           # KV latent 128, an eighth
head_dim = 64
n_expert = 16
expert_dim = 1024
router_dim = 128
batch_size = 32         # 32 * 1024 * 16 = 524,288 tokens a step
grad_accum = 16         # over all processes together: 8 GPUs take 2 each
max_steps = 20_000      # 10.5B tokens
warmup_steps = 200
lr = 1e-3
min_lr = 1e-4
balancer_lr = 1e-3      # small steps are enough in a long run
eval_every = 500
checkpoint_every = 500
compile = True
