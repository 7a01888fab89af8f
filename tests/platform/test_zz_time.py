import time, subprocess, sys, os, glob
from pathlib import Path
def test_a(ray_cluster, tmp_path):
    (tmp_path/"a.py").write_text("print('hi')")
    (tmp_path/"pyproject.toml").touch()
    for i in range(3):
        t=time.time()
        r=subprocess.run([sys.executable,"-m","deta.jobs.cli","submit","a.py"],cwd=tmp_path,env=ray_cluster.env|{"PYTHONPATH":"/work/main"},capture_output=True,text=True)
        print(i, time.time()-t, r.returncode, r.stdout, r.stderr)
    t=time.time()
    r=subprocess.run([sys.executable,"-m","deta.jobs.cli","submit","jobs/deta_r50.py","--help"],cwd="/work/main",env=ray_cluster.env|{"MLFLOW_TRACKING_TOKEN":"never-to-"+"be-shown"},capture_output=True,text=True)
    print(time.time()-t, r.returncode, r.stdout[:600], r.stderr)
    r=subprocess.run(["/work/main/.venv/bin/ray","job","submit","jobs/deta_r50.py"],cwd="/work/main",env=ray_cluster.env,capture_output=True,text=True)
    print("BARE", r.returncode, r.stdout[-500:])
    logs=os.path.join(ray_cluster.folder,"session_latest","logs")
    r=subprocess.run(["grep","-rl","never-to-"+"be-shown",logs],capture_output=True,text=True); print("SECRET IN", r.stdout)
