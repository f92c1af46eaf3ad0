"Servers that speak real HTTP on a free port of this machine, and can be killed and started again at the same address"
import os, signal, socket, subprocess, sys, time, urllib.request

class Server:
    "A process with an address"
    def __init__(self, folder):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); self.port = s.getsockname()[1]
        self.folder, self.address, self.process = folder, f'http://127.0.0.1:{self.port}', None
        self.folder.mkdir()
    def start(self, wait=True):
        with open(self.folder/'log', 'a') as log:
            self.process = subprocess.Popen([sys.executable, *self.command()], cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
                                            start_new_session=True, env=os.environ | self.env)
        while wait and not self.answers():
            assert self.process.poll() is None, (self.folder/'log').read_text()
            time.sleep(.1)
        return self
    def answers(self):
        try: return urllib.request.urlopen(self.address + self.health, timeout=1).status == 200
        except OSError: return False
    def kill(self):
        if self.process: os.killpg(self.process.pid, signal.SIGKILL); self.process.wait() # the server and its workers
        self.process = None

class MlflowServer(Server):
    "`mlflow server` with a database and a folder of artifacts"
    health, env = '/health', dict(MLFLOW_DISABLE_TELEMETRY='true', MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false')
    def command(self):
        return ['-m', 'mlflow', 'server', '--backend-store-uri', f'sqlite:///{self.folder}/mlflow.db', '--workers', '1',
                '--artifacts-destination', str(self.folder/'artifacts'), '--host', '127.0.0.1', '--port', str(self.port)]

class MotoServer(Server):
    "`moto_server`: S3, IAM, STS, SageMaker and others without an account"
    health, env = '/moto-api/', {}
    def command(self): return ['-m', 'moto.server', '-H', '127.0.0.1', '-p', str(self.port)]
    def settings(self): # environment in which boto3 talks to it; the keys are nobody's
        return dict(AWS_ENDPOINT_URL=self.address, AWS_ACCESS_KEY_ID='testing', AWS_SECRET_ACCESS_KEY='testing', AWS_REGION='eu-west-1',
                    AWS_DEFAULT_REGION='eu-west-1', AWS_EC2_METADATA_DISABLED='true')
