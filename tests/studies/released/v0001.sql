BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE autosft_attempts (
	id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	"plan" TEXT NOT NULL, 
	device_uuids TEXT NOT NULL, 
	started_at DOUBLE NOT NULL, 
	ended_at DOUBLE, 
	outcome VARCHAR(32), 
	message TEXT, 
	log_path TEXT, 
	peak_allocated_bytes BIGINT, 
	peak_reserved_bytes BIGINT, 
	duration_s DOUBLE, 
	eval_fingerprint TEXT, 
	CONSTRAINT pk_autosft_attempts PRIMARY KEY (id), 
	CONSTRAINT fk_autosft_attempts_trial_id FOREIGN KEY(trial_id) REFERENCES autosft_trials (id) ON DELETE CASCADE, 
	CONSTRAINT uq_autosft_attempts_trial_id_number UNIQUE (trial_id, number)
);
INSERT INTO "autosft_attempts" VALUES(1,1,1,'{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}','["GPU-0"]',2.0,5.0,'completed','',NULL,2147483648,NULL,4.0,'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee');
INSERT INTO "autosft_attempts" VALUES(2,2,1,'{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}','["GPU-0"]',2.0,5.0,'pruned','',NULL,2147483648,NULL,4.0,'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee');
INSERT INTO "autosft_attempts" VALUES(3,3,1,'{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}','["GPU-0"]',2.0,5.0,'out of device memory','it was out of device memory',NULL,2147483648,NULL,4.0,'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee');
INSERT INTO "autosft_attempts" VALUES(4,4,1,'{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}','["GPU-0"]',6.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE autosft_checkpoints (
	id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	evaluation INTEGER, 
	value DOUBLE, 
	path TEXT NOT NULL, 
	num_bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	has_resume_state BOOLEAN NOT NULL, 
	created_at DOUBLE NOT NULL, 
	CONSTRAINT pk_autosft_checkpoints PRIMARY KEY (id), 
	CONSTRAINT fk_autosft_checkpoints_trial_id FOREIGN KEY(trial_id) REFERENCES autosft_trials (id) ON DELETE CASCADE, 
	CONSTRAINT uq_autosft_checkpoints_path UNIQUE (path)
);
INSERT INTO "autosft_checkpoints" VALUES(1,1,1,10,1,1.5,'/data/studies/study/trials/0000/checkpoints/step-000010',0,'',1,3.0);
INSERT INTO "autosft_checkpoints" VALUES(2,2,1,10,1,2.0,'/data/studies/study/trials/0001/checkpoints/step-000010',0,'',1,3.0);
INSERT INTO "autosft_checkpoints" VALUES(3,3,1,10,1,1.2,'/data/studies/study/trials/0002/checkpoints/step-000010',0,'',1,3.0);
CREATE TABLE autosft_commands (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	trial INTEGER, 
	parameters TEXT NOT NULL, 
	requested_at DOUBLE NOT NULL, 
	done_at DOUBLE, 
	CONSTRAINT pk_autosft_commands PRIMARY KEY (id), 
	CONSTRAINT fk_autosft_commands_study_id FOREIGN KEY(study_id) REFERENCES autosft_studies (id) ON DELETE CASCADE
);
CREATE TABLE autosft_drivers (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	host TEXT NOT NULL, 
	pid INTEGER NOT NULL, 
	pid_started_at DOUBLE NOT NULL, 
	started_at DOUBLE NOT NULL, 
	heartbeat_at DOUBLE NOT NULL, 
	ended_at DOUBLE, 
	environment TEXT NOT NULL, 
	CONSTRAINT pk_autosft_drivers PRIMARY KEY (id), 
	CONSTRAINT fk_autosft_drivers_study_id FOREIGN KEY(study_id) REFERENCES autosft_studies (id) ON DELETE CASCADE
);
INSERT INTO "autosft_drivers" VALUES(1,1,'host-1',1,0.0,0.0,0.0,7.0,'{"versions": {"torch": "2.13"}}');
CREATE TABLE autosft_measurements (
	id INTEGER NOT NULL, 
	attempt_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	evaluation INTEGER NOT NULL, 
	num_steps INTEGER NOT NULL, 
	num_tokens BIGINT NOT NULL, 
	loss DOUBLE, 
	grad_norm DOUBLE, 
	learning_rate DOUBLE, 
	tokens_per_s DOUBLE, 
	peak_allocated_bytes BIGINT, 
	peak_reserved_bytes BIGINT, 
	metrics TEXT NOT NULL, 
	checkpoint TEXT, 
	elapsed_s DOUBLE NOT NULL, 
	recorded_at DOUBLE NOT NULL, 
	CONSTRAINT pk_autosft_measurements PRIMARY KEY (id), 
	CONSTRAINT fk_autosft_measurements_attempt_id FOREIGN KEY(attempt_id) REFERENCES autosft_attempts (id) ON DELETE CASCADE, 
	CONSTRAINT uq_autosft_measurements_attempt_id_step_evaluation UNIQUE (attempt_id, step, evaluation)
);
INSERT INTO "autosft_measurements" VALUES(1,1,5,0,40,1000,1.0,1.0,0.0001,9000.0,2147483648,NULL,'{}',NULL,1.0,3.0);
INSERT INTO "autosft_measurements" VALUES(2,1,10,1,40,1000,1.5,1.0,0.0001,9000.0,2147483648,NULL,'{"eval_loss": 1.5, "eval_tokens": 500.0}','/data/studies/study/trials/0000/checkpoints/step-000010',1.0,3.0);
INSERT INTO "autosft_measurements" VALUES(3,2,5,0,40,1000,1.0,1.0,0.0001,9000.0,2147483648,NULL,'{}',NULL,1.0,3.0);
INSERT INTO "autosft_measurements" VALUES(4,2,10,1,40,1000,2.0,1.0,0.0001,9000.0,2147483648,NULL,'{"eval_loss": 2.0, "eval_tokens": 500.0}','/data/studies/study/trials/0001/checkpoints/step-000010',1.0,3.0);
INSERT INTO "autosft_measurements" VALUES(5,3,5,0,40,1000,1.0,1.0,0.0001,9000.0,2147483648,NULL,'{}',NULL,1.0,3.0);
INSERT INTO "autosft_measurements" VALUES(6,3,10,1,40,1000,1.2,1.0,0.0001,9000.0,2147483648,NULL,'{"eval_loss": 1.2, "eval_tokens": 500.0}','/data/studies/study/trials/0002/checkpoints/step-000010',1.0,3.0);
CREATE TABLE autosft_memory_observations (
	id INTEGER NOT NULL, 
	study TEXT NOT NULL, 
	trial INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	model_fingerprint TEXT NOT NULL, 
	device_name TEXT NOT NULL, 
	settings TEXT NOT NULL, 
	pinned TEXT NOT NULL, 
	"plan" TEXT NOT NULL, 
	measured_allocated_bytes BIGINT, 
	measured_reserved_bytes BIGINT, 
	out_of_memory BOOLEAN NOT NULL, 
	recorded_at DOUBLE NOT NULL, 
	CONSTRAINT pk_autosft_memory_observations PRIMARY KEY (id), 
	CONSTRAINT uq_autosft_memory_observations_study_trial_attempt UNIQUE (study, trial, attempt)
);
INSERT INTO "autosft_memory_observations" VALUES(1,'study',0,1,'mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm','test device','{"learning_rate": 0.00014, "lr_scheduler": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.05, "effective_batch_size": 64, "seq_len": 128, "method": "full", "optimizer": "adamw_torch", "lora": null, "num_train_examples": 10000, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "seed": 0, "max_train_samples": null}','{"precision": "fp32", "tf32": false, "attention": "sdpa", "packing": false, "eval_seq_len": 128, "eval_micro_batch": 8, "eval_fingerprint": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee", "num_evaluations": 4}','{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}',5,NULL,0,4.0);
INSERT INTO "autosft_memory_observations" VALUES(2,'study',1,1,'mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm','test device','{"learning_rate": 6.97e-05, "lr_scheduler": "cosine", "warmup_ratio": 0.16, "weight_decay": 0.06, "effective_batch_size": 128, "seq_len": 128, "method": "full", "optimizer": "adamw_torch", "lora": null, "num_train_examples": 10000, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "seed": 0, "max_train_samples": null}','{"precision": "fp32", "tf32": false, "attention": "sdpa", "packing": false, "eval_seq_len": 128, "eval_micro_batch": 8, "eval_fingerprint": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee", "num_evaluations": 4}','{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}',5,NULL,0,4.0);
INSERT INTO "autosft_memory_observations" VALUES(3,'study',2,1,'mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm','test device','{"learning_rate": 1.75e-05, "lr_scheduler": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.1, "effective_batch_size": 128, "seq_len": 128, "method": "full", "optimizer": "adamw_torch", "lora": null, "num_train_examples": 10000, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "seed": 0, "max_train_samples": null}','{"precision": "fp32", "tf32": false, "attention": "sdpa", "packing": false, "eval_seq_len": 128, "eval_micro_batch": 8, "eval_fingerprint": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee", "num_evaluations": 4}','{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}',5,NULL,0,4.0);
CREATE TABLE autosft_queue (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	parameters TEXT NOT NULL, 
	origin TEXT NOT NULL, 
	enqueued_at DOUBLE NOT NULL, 
	trial INTEGER, 
	CONSTRAINT pk_autosft_queue PRIMARY KEY (id), 
	CONSTRAINT fk_autosft_queue_study_id FOREIGN KEY(study_id) REFERENCES autosft_studies (id) ON DELETE CASCADE
);
INSERT INTO "autosft_queue" VALUES(1,1,'{"learning_rate": 0.00014, "warmup_ratio": 0.1, "weight_decay": 0.05, "lr_scheduler": "cosine", "effective_batch_size": 64}','enqueued',1.0,0);
CREATE TABLE autosft_studies (
	id INTEGER NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	spec TEXT NOT NULL, 
	num_trials INTEGER NOT NULL, 
	created_at DOUBLE NOT NULL, 
	driver_id INTEGER, 
	CONSTRAINT pk_autosft_studies PRIMARY KEY (id), 
	CONSTRAINT uq_autosft_studies_name UNIQUE (name)
);
INSERT INTO "autosft_studies" VALUES(1,'study','{"name": "study", "metric": "eval_loss", "direction": "minimize", "model": "models/tiny", "model_fingerprint": "mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm", "data": "data.jsonl", "data_fingerprint": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd", "pinned": {"precision": "fp32", "tf32": false, "attention": "sdpa", "packing": false, "eval_seq_len": 128, "eval_micro_batch": 8, "eval_fingerprint": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee", "num_evaluations": 4}, "fixed": {"num_train_examples": 10000, "seed": 0, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "max_train_samples": null}, "space": {"learning_rate": {"low": 1.4e-05, "high": 0.0014, "log": true, "step": null, "default": 0.00014}, "warmup_ratio": {"low": 0.0, "high": 0.2, "log": false, "step": 0.02, "default": 0.1}, "weight_decay": {"low": 0.0, "high": 0.1, "log": false, "step": 0.01, "default": 0.01}, "lr_scheduler": {"values": ["cosine", "linear", "constant_with_warmup"], "default": null}, "effective_batch_size": {"values": [32, 64, 128], "default": 64}, "seq_len": {"value": 128}, "method": {"value": "full"}, "optimizer": {"value": "adamw_torch"}, "lora_rank": {"values": [4, 8, 16, 32, 64], "default": 16}, "lora_alpha_ratio": {"values": [1.0, 2.0, 4.0], "default": 2.0}, "lora_targets": {"value": "all-linear"}}, "seed": 0, "num_trials": 30, "environment": {"versions": {"torch": "2.13"}}, "output_dir": "/data/studies/study"}',30,0.0,NULL);
CREATE TABLE autosft_trials (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	origin TEXT NOT NULL, 
	parameters TEXT NOT NULL, 
	settings TEXT NOT NULL, 
	"plan" TEXT, 
	num_attempts INTEGER NOT NULL, 
	value DOUBLE, 
	best_step INTEGER, 
	best_checkpoint TEXT, 
	failure VARCHAR(32), 
	message TEXT NOT NULL, 
	asked_at DOUBLE NOT NULL, 
	started_at DOUBLE, 
	finished_at DOUBLE, 
	CONSTRAINT pk_autosft_trials PRIMARY KEY (id), 
	CONSTRAINT fk_autosft_trials_study_id FOREIGN KEY(study_id) REFERENCES autosft_studies (id) ON DELETE CASCADE, 
	CONSTRAINT uq_autosft_trials_study_id_number UNIQUE (study_id, number)
);
INSERT INTO "autosft_trials" VALUES(1,1,0,'completed','enqueued','{"learning_rate": 0.00014, "warmup_ratio": 0.1, "weight_decay": 0.05, "lr_scheduler": "cosine", "effective_batch_size": 64}','{"learning_rate": 0.00014, "lr_scheduler": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.05, "effective_batch_size": 64, "seq_len": 128, "method": "full", "optimizer": "adamw_torch", "lora": null, "num_train_examples": 10000, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "seed": 0, "max_train_samples": null}','{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}',1,1.5,10,'/data/studies/study/trials/0000/checkpoints/step-000010',NULL,'',1.0,2.0,5.0);
INSERT INTO "autosft_trials" VALUES(2,1,1,'stopped','sampler','{"learning_rate": 6.97e-05, "warmup_ratio": 0.16, "weight_decay": 0.06, "lr_scheduler": "cosine", "effective_batch_size": 128}','{"learning_rate": 6.97e-05, "lr_scheduler": "cosine", "warmup_ratio": 0.16, "weight_decay": 0.06, "effective_batch_size": 128, "seq_len": 128, "method": "full", "optimizer": "adamw_torch", "lora": null, "num_train_examples": 10000, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "seed": 0, "max_train_samples": null}','{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}',1,2.0,10,'/data/studies/study/trials/0001/checkpoints/step-000010',NULL,'',1.0,2.0,5.0);
INSERT INTO "autosft_trials" VALUES(3,1,2,'infeasible','sampler','{"learning_rate": 1.75e-05, "warmup_ratio": 0.2, "weight_decay": 0.1, "lr_scheduler": "cosine", "effective_batch_size": 128}','{"learning_rate": 1.75e-05, "lr_scheduler": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.1, "effective_batch_size": 128, "seq_len": 128, "method": "full", "optimizer": "adamw_torch", "lora": null, "num_train_examples": 10000, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "seed": 0, "max_train_samples": null}','{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}',1,1.2,10,'/data/studies/study/trials/0002/checkpoints/step-000010','out of device memory','it was out of device memory',1.0,2.0,5.0);
INSERT INTO "autosft_trials" VALUES(4,1,3,'running','sampler','{"learning_rate": 0.00103, "warmup_ratio": 0.02, "weight_decay": 0.03, "lr_scheduler": "linear", "effective_batch_size": 64}','{"learning_rate": 0.00103, "lr_scheduler": "linear", "warmup_ratio": 0.02, "weight_decay": 0.03, "effective_batch_size": 64, "seq_len": 128, "method": "full", "optimizer": "adamw_torch", "lora": null, "num_train_examples": 10000, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "seed": 0, "max_train_samples": null}','{"device_name": "test device", "micro_batch": 4, "gradient_accumulation": 8, "data_parallel": 1, "checkpointing": "off", "sharding": "none", "num_threads": 1, "memory_cap_bytes": 3221225472, "estimate": {"allocated": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "need": {"median_bytes": 2147483648, "upper_bytes": 3221225472}, "uncapped": {"median_bytes": 3221225472, "upper_bytes": 4294967296}, "outside_bytes": 1073741824, "components": [["parameters", 1073741824], ["activations", 1073741824]], "peak_phase": "layer backward", "peak_owner": "activations", "method": "closed form", "bound_level": 0.95, "num_calibration_rows": 0, "untraced": [], "uncalibrated_bytes": 0, "stack": ""}, "predicted_tokens_per_s": 10000.0, "predicted_duration_s": 60.0, "reason": "the largest that fits"}',1,NULL,NULL,NULL,NULL,'',6.0,6.0,NULL);
CREATE TABLE autosft_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT autosft_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "autosft_version" VALUES('0001');
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'study');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MINIMIZE',1,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_system_attributes" VALUES(1,1,'study:metric_names','["eval_loss"]');
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_user_attributes" VALUES(1,1,'metric','"eval_loss"');
INSERT INTO "study_user_attributes" VALUES(2,1,'model','"models/tiny"');
INSERT INTO "study_user_attributes" VALUES(3,1,'data','"data.jsonl"');
INSERT INTO "study_user_attributes" VALUES(4,1,'autosft','true');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_intermediate_values" VALUES(1,1,1000,1.5,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(2,2,1000,2.0,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(3,3,1000,1.2,'FINITE');
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'learning_rate',0.00014,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1.4e-05, "high": 0.0014, "log": true}}');
INSERT INTO "trial_params" VALUES(2,1,'warmup_ratio',0.1,'{"name": "FloatDistribution", "attributes": {"step": 0.02, "low": 0.0, "high": 0.2, "log": false}}');
INSERT INTO "trial_params" VALUES(3,1,'weight_decay',0.05,'{"name": "FloatDistribution", "attributes": {"step": 0.01, "low": 0.0, "high": 0.1, "log": false}}');
INSERT INTO "trial_params" VALUES(4,1,'lr_scheduler',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["cosine", "linear", "constant_with_warmup"]}}');
INSERT INTO "trial_params" VALUES(5,1,'effective_batch_size',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [32, 64, 128]}}');
INSERT INTO "trial_params" VALUES(6,2,'learning_rate',6.97e-05,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1.4e-05, "high": 0.0014, "log": true}}');
INSERT INTO "trial_params" VALUES(7,2,'warmup_ratio',0.16,'{"name": "FloatDistribution", "attributes": {"step": 0.02, "low": 0.0, "high": 0.2, "log": false}}');
INSERT INTO "trial_params" VALUES(8,2,'weight_decay',0.06,'{"name": "FloatDistribution", "attributes": {"step": 0.01, "low": 0.0, "high": 0.1, "log": false}}');
INSERT INTO "trial_params" VALUES(9,2,'lr_scheduler',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["cosine", "linear", "constant_with_warmup"]}}');
INSERT INTO "trial_params" VALUES(10,2,'effective_batch_size',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [32, 64, 128]}}');
INSERT INTO "trial_params" VALUES(11,3,'learning_rate',1.75e-05,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1.4e-05, "high": 0.0014, "log": true}}');
INSERT INTO "trial_params" VALUES(12,3,'warmup_ratio',0.2,'{"name": "FloatDistribution", "attributes": {"step": 0.02, "low": 0.0, "high": 0.2, "log": false}}');
INSERT INTO "trial_params" VALUES(13,3,'weight_decay',0.1,'{"name": "FloatDistribution", "attributes": {"step": 0.01, "low": 0.0, "high": 0.1, "log": false}}');
INSERT INTO "trial_params" VALUES(14,3,'lr_scheduler',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["cosine", "linear", "constant_with_warmup"]}}');
INSERT INTO "trial_params" VALUES(15,3,'effective_batch_size',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [32, 64, 128]}}');
INSERT INTO "trial_params" VALUES(16,4,'learning_rate',0.00103,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1.4e-05, "high": 0.0014, "log": true}}');
INSERT INTO "trial_params" VALUES(17,4,'warmup_ratio',0.02,'{"name": "FloatDistribution", "attributes": {"step": 0.02, "low": 0.0, "high": 0.2, "log": false}}');
INSERT INTO "trial_params" VALUES(18,4,'weight_decay',0.03,'{"name": "FloatDistribution", "attributes": {"step": 0.01, "low": 0.0, "high": 0.1, "log": false}}');
INSERT INTO "trial_params" VALUES(19,4,'lr_scheduler',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["cosine", "linear", "constant_with_warmup"]}}');
INSERT INTO "trial_params" VALUES(20,4,'effective_batch_size',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [32, 64, 128]}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_system_attributes" VALUES(1,1,'autosft','0');
INSERT INTO "trial_system_attributes" VALUES(2,2,'autosft','1');
INSERT INTO "trial_system_attributes" VALUES(3,3,'autosft','2');
INSERT INTO "trial_system_attributes" VALUES(4,3,'constraints:memory over budget','1.0');
INSERT INTO "trial_system_attributes" VALUES(5,4,'autosft','3');
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'trial','0');
INSERT INTO "trial_user_attributes" VALUES(2,1,'origin','"enqueued"');
INSERT INTO "trial_user_attributes" VALUES(3,1,'state','"completed"');
INSERT INTO "trial_user_attributes" VALUES(4,1,'best step','10');
INSERT INTO "trial_user_attributes" VALUES(5,1,'best checkpoint','"/data/studies/study/trials/0000/checkpoints/step-000010"');
INSERT INTO "trial_user_attributes" VALUES(6,1,'plan','"test device: micro batch 4 x accumulation 8 x devices 1"');
INSERT INTO "trial_user_attributes" VALUES(7,1,'predicted memory (GiB)','4.0');
INSERT INTO "trial_user_attributes" VALUES(8,1,'measured memory (GiB)','2.0');
INSERT INTO "trial_user_attributes" VALUES(9,2,'trial','1');
INSERT INTO "trial_user_attributes" VALUES(10,2,'origin','"sampler"');
INSERT INTO "trial_user_attributes" VALUES(11,2,'state','"stopped"');
INSERT INTO "trial_user_attributes" VALUES(12,2,'best step','10');
INSERT INTO "trial_user_attributes" VALUES(13,2,'best checkpoint','"/data/studies/study/trials/0001/checkpoints/step-000010"');
INSERT INTO "trial_user_attributes" VALUES(14,2,'plan','"test device: micro batch 4 x accumulation 8 x devices 1"');
INSERT INTO "trial_user_attributes" VALUES(15,2,'predicted memory (GiB)','4.0');
INSERT INTO "trial_user_attributes" VALUES(16,2,'measured memory (GiB)','2.0');
INSERT INTO "trial_user_attributes" VALUES(17,3,'trial','2');
INSERT INTO "trial_user_attributes" VALUES(18,3,'origin','"sampler"');
INSERT INTO "trial_user_attributes" VALUES(19,3,'state','"infeasible"');
INSERT INTO "trial_user_attributes" VALUES(20,3,'why','"out of device memory: it was out of device memory"');
INSERT INTO "trial_user_attributes" VALUES(21,3,'best step','10');
INSERT INTO "trial_user_attributes" VALUES(22,3,'best checkpoint','"/data/studies/study/trials/0002/checkpoints/step-000010"');
INSERT INTO "trial_user_attributes" VALUES(23,3,'plan','"test device: micro batch 4 x accumulation 8 x devices 1"');
INSERT INTO "trial_user_attributes" VALUES(24,3,'predicted memory (GiB)','4.0');
INSERT INTO "trial_user_attributes" VALUES(25,3,'measured memory (GiB)','2.0');
INSERT INTO "trial_user_attributes" VALUES(26,4,'trial','3');
INSERT INTO "trial_user_attributes" VALUES(27,4,'origin','"sampler"');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,1.5,'FINITE');
INSERT INTO "trial_values" VALUES(2,2,0,2.0,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-22 22:11:29.406185','2026-11-22 22:11:29.511290');
INSERT INTO "trials" VALUES(2,1,1,'PRUNED','2026-11-22 22:11:29.540971','2026-11-22 22:11:29.597235');
INSERT INTO "trials" VALUES(3,2,1,'PRUNED','2026-11-22 22:11:29.601191','2026-11-22 22:11:29.629940');
INSERT INTO "trials" VALUES(4,3,1,'RUNNING','2026-11-22 22:11:29.633313',NULL);
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE INDEX ix_autosft_commands_study_id ON autosft_commands (study_id);
CREATE INDEX ix_autosft_drivers_study_id ON autosft_drivers (study_id);
CREATE INDEX ix_autosft_queue_study_id ON autosft_queue (study_id);
CREATE INDEX ix_autosft_checkpoints_trial_id ON autosft_checkpoints (trial_id);
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;
