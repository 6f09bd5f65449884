#!/usr/bin/env bash
# RLHF Diffusion-Sharpening of SDXL with the published settings: fp16, 8-bit Adam, xformers, the fp16-fix VAE.
#
#   MODEL_NAME=stabilityai/stable-diffusion-xl-base-1.0 PROMPTS_FILE=prompts.txt bash scripts/rlhf.sh [more flags]
#
# PROMPTS_FILE has a prompt on each line, or is csv or jsonl with a column text. Instead of it, DATASET_NAME or
# TRAIN_DATA_DIR name a data set, of which only the captions are read. Needs one CUDA GPU. Flags given here come last and win.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
: "${MODEL_NAME:?set MODEL_NAME to an SDXL pipeline, e.g. stabilityai/stable-diffusion-xl-base-1.0}"
if [ -n "${PROMPTS_FILE:-}" ]; then
  DATA=(--prompts_file="$PROMPTS_FILE")
elif [ -n "${TRAIN_DATA_DIR:-}" ]; then
  DATA=(--train_data_dir="$TRAIN_DATA_DIR")
else
  DATA=(--dataset_name="${DATASET_NAME:?set PROMPTS_FILE to a file of prompts, or DATASET_NAME or TRAIN_DATA_DIR}")
fi
install requirements.txt
source "$VENV/bin/activate"

accelerate launch --quiet --main_process_port 10951 train_rlhf_diffusion_sharpening_sdxl.py \
  --pretrained_model_name_or_path="$MODEL_NAME" \
  --pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix" \
  "${DATA[@]}" \
  --enable_xformers_memory_efficient_attention \
  --resolution=512 --center_crop --random_flip \
  --proportion_empty_prompts=0.2 \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 --gradient_checkpointing \
  --max_train_steps=10000 \
  --use_8bit_adam \
  --learning_rate=1e-06 --lr_scheduler="constant" --lr_warmup_steps=0 \
  --mixed_precision="fp16" \
  --reward_model="clip" \
  --report_to="wandb" \
  --validation_prompt="a cute Sundar Pichai creature" --validation_epochs=5 \
  --checkpointing_steps=5000 \
  --output_dir="${OUTPUT_DIR:-outputs/rlhf}" \
  "$@"
