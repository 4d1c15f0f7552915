"""The configuration of the throwaway Slurm: what `slurm/testbed.py` writes into its folder."""

NODES, CPUS, GPUS = 2, 4, 4
GRACE_S = 60  # seconds for a pre-empted job to save
LOOPBACK = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"  # where the host is localhost
SLURM_CONF = f"""\
ClusterName=testbed
SlurmctldHost={{host}}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={{slurmctld}}
{{bind}}
AuthType=auth/munge
# A requeued job waits until the credential of its last start is void: 120 s unless told otherwise.
AuthInfo=socket={{folder}}/munge/socket,cred_expire=20
StateSaveLocation={{folder}}/ctld
SlurmctldPidFile={{folder}}/ctld.pid
SlurmctldLogFile={{folder}}/log/slurmctld.log
SlurmdSpoolDir={{folder}}/spool/%n
SlurmdPidFile={{folder}}/%n.pid
SlurmdLogFile={{folder}}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
# submitit makes the port of a job from its id: two testbeds must not count alike.
FirstJobId={{first_job}}
JobRequeue=1
KillWait=5
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={{slurmdbd}}
# With munge this "password" is the socket to use; AuthInfo does not count here.
AccountingStoragePass={{folder}}/munge/socket
JobAcctGatherType=jobacct_gather/linux
GresTypes=gpu
NodeName=node[1-{NODES}] NodeHostname=localhost NodeAddr=127.0.0.1 \
Port=[{{node1}}-{{node{NODES}}}] CPUs={CPUS} RealMemory=8000 Gres=gpu:a100:{GPUS}
# Jobs of the second partition pre-empt those of the first, which are warned and then queued again.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=node[1-{NODES}] Default=YES MaxTime=2-00:00:00 State=UP \
PriorityTier=1 GraceTime={GRACE_S}
PartitionName=urgent Nodes=node[1-{NODES}] MaxTime=2-00:00:00 State=UP PriorityTier=10 \
PreemptMode=OFF
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={slurmdbd}
{bind}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/dbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadbd}
StorageUser=slurm
StoragePass={password}
"""
# One file per GPU: with one file for four, Slurm declares the nodes invalid.
GRES_CONF = f"NodeName=node[1-{NODES}] Name=gpu Type=a100 File={{folder}}/gpu[0-{GPUS - 1}]\n"
FIRST_SQL = """\
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY '{password}';
CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON slurm_acct_db.* TO slurm@localhost;
GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
"""
