#!/usr/bin/env bash
# From a bare clone to a sharpened model: environment, data, training, comparison. Everything is on disk or made here.
# Flags given here go to the training script, come last and win.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
source scripts/quickstart_common.sh
begin quickstart "$@"

python tiny_world/make_shapes_dataset.py --output_dir "$OUT/shapes" --num_images 2000 --seed 1 \
  --held_out_prompts "$OUT/held_out_prompts.txt"

accelerate launch --quiet --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 2 \
  --mixed_precision no --dynamo_backend no \
  train_sft_diffusion_sharpening_sdxl.py \
  --pretrained_model_name_or_path=tiny_world/sdxl \
  --train_data_dir="$OUT/shapes" --cache_dir="$OUT/cache" \
  --resolution=32 --center_crop --proportion_empty_prompts=0.1 \
  --reward_model=shapes \
  --train_batch_size=24 --max_train_steps=300 --seed=0 \
  --learning_rate=5e-4 --lr_scheduler=cosine --lr_warmup_steps=30 \
  --adam_weight_decay=0 --use_ema --ema_decay=0.98 \
  --score_batch_size=72 --decode_batch_size=72 --train_rows=24 \
  --validation_prompts_file="$OUT/held_out_prompts.txt" --num_validation_images=8 --validation_guidance_scale=1 \
  --validation_steps=50 --validation_epochs=0 \
  --checkpointing_steps=150 --report_to=tensorboard \
  --output_dir="$OUT/run" "$@"

judge
