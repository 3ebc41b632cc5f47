# Continue the run of config/small.py at four times its context: `python train.py config/longer.py`.
# To train on conversations as well, prepare them for the longer context, which keeps more of their reasoning:
#   python -m data.chat.prepare FILE.jsonl --out=data/chat_longer --context=1024 --tokenizer_from=data/chat
#   python train.py config/longer.py --init_from=runs/chat --dataset='data/stdlib:0.3 data/chat_longer:0.7'
init_from = 'runs/small'
out_dir = 'runs/longer'
context = 1024
rope_base = 100_000    # longer contexts need lower RoPE frequencies: the report goes from 10K at 4K to 1M at 32K
batch_size = 4          # 4 * 1024 tokens per step, as in config/small.py
max_steps = 200
warmup_steps = 20
lr = 2e-3               # lower, since training starts from trained weights
min_lr = 2e-4
eval_batches = 5
